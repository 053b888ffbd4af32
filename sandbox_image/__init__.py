"""Data for the sandbox's image: Dockerfile, requirements, seccomp profile. Policy is data here, not code."""
