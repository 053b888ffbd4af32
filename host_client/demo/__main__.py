"""``python -m host_client.demo``."""

import sys

from host_client.demo import main

sys.exit(main())
