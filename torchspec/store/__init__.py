"""The Mooncake store between the two pools: its master, its memory, and the clients of both sides.

Mooncake takes process-wide settings from environment variables, some of them when it is imported. Importing this
package sets them, for this process and its children; they are constants and not knobs.
"""

from __future__ import annotations

import os

os.environ.update(
    {
        "MC_LOG_LEVEL": "ERROR",  # default: a dozen lines for each connection
        "MC_STORE_CLIENT_METRIC": "0",
        # A dead or hung master must show as StoreUnavailable within seconds (defaults: 30 s each, 20 attempts).
        "MC_RPC_CONNECT_TIMEOUT_MS": "2000",
        "MC_RPC_TIMEOUT_MS": "10000",
        "MC_STORE_CLIENT_SETUP_RETRIES": "3",
        # The same for a hung store node (default: 30 s).
        "MC_TCP_PROGRESS_TIMEOUT_SEC": "10",
        "MC_TCP_STATUS_TIMEOUT_SEC": "10",
    }
)
