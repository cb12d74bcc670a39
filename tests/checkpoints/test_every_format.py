"""Every format, and views over formats, keep what checkpoints promise."""

import pytest
from support.checkpoint_suite import CASES, CheckpointSuite


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestEveryFormat(CheckpointSuite):
    pass
