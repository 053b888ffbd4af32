"""Hooks around the iterations of ``dspy.RLM``, with the names and signatures of ``dspy-rlm-hooks``.

    from host_client.hooks import PreExecutionOutput, disable_rlm_hooks, enable_rlm_hooks

    def no_eval(iteration, code, variables, history, input_args):
        return PreExecutionOutput(code.replace("eval(", "int("))

    enable_rlm_hooks(rlm, pre_execution_hook=no_eval)

In the order in which they run; a hook may be a coroutine function, and None means "no change":

    ====================  ========================================================  ======================
    hook                  called with                                               may return
    ====================  ========================================================  ======================
    pre_iteration_hook    iteration, variables, history, input_args                 PreIterationOutput
    pre_execution_hook    iteration, code, variables, history, input_args           PreExecutionOutput
    post_execution_hook   iteration, code, result, variables, history, input_args   PostExecutionOutput
    post_iteration_hook   iteration, pred, code, result, history                    PostIterationOutput
    ====================  ========================================================  ======================

``docs/hooks.md`` has the exact meaning. They work with any interpreter, and under DSPy 3.1.3 to 3.4.1.
"""

from __future__ import annotations

from host_client.hooks.enabling import disable_rlm_hooks, enable_rlm_hooks
from host_client.hooks.iteration import call_state
from host_client.hooks.outputs import (
    PostExecutionHook,
    PostExecutionOutput,
    PostIterationHook,
    PostIterationOutput,
    PreExecutionHook,
    PreExecutionOutput,
    PreIterationHook,
    PreIterationOutput,
    RLMHook,
)

__all__ = [
    "PostExecutionHook",
    "PostExecutionOutput",
    "PostIterationHook",
    "PostIterationOutput",
    "PreExecutionHook",
    "PreExecutionOutput",
    "PreIterationHook",
    "PreIterationOutput",
    "RLMHook",
    "call_state",
    "disable_rlm_hooks",
    "enable_rlm_hooks",
]
