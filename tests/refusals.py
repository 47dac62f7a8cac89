"""How a test reads a refusal."""

from collections.abc import Callable

import pytest

from supernet.errors import InputError


def refusal(call: Callable[[], object]) -> str:
    """The one line with which a call refuses its input."""
    with pytest.raises(InputError) as refused:
        call()
    message = str(refused.value)
    assert message and "\n" not in message
    return message
