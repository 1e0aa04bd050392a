"""Which tests go to one worker together when `pytest -n` spreads them over processes.

What a file prepares once, in a fixture of its module, is prepared in one process; so a file is one
group. Of files that prepare nothing long the tests of one case are a group, in whichever file: they
share its yardstick. What names no case goes by its function.
"""

from __future__ import annotations

import re

from cases import BY_NAME
from xdist.scheduler import LoadScopeScheduling

SPREAD = {
    *("tests/test_attention.py", "tests/test_attention_planted.py", "tests/test_decode.py"),
    *("tests/call/test_ops.py", "tests/call/test_ops_compile.py"),
    *("tests/backends/cuda/test_attention.py", "tests/backends/triton/test_planted.py"),
    *("tests/backends/triton/test_block_range.py", "tests/backends/triton/test_tma.py"),
}
TOGETHER = "tests/gpu_check/"  # its programs build into one folder


class Groups(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    file, _, test = nodeid.partition("::")
    if file.startswith(TOGETHER):
        return TOGETHER
    if file not in SPREAD:
        return file
    function, _, parameters = test.partition("[")
    named = (part for part in re.split(r"[-\]]", parameters) if part in BY_NAME)
    return next(named, f"{file}::{function}")
