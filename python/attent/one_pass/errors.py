"""What one-pass teaching says of a learner that it cannot serve."""

from __future__ import annotations


class OnePassError(RuntimeError):
    """This learner, or this operation of it, cannot be taught in one pass; the message names it and says why.

    A gradient that ``verify_every`` found to be another than the whole batch's masked one raises it too.

    >>> from attent.one_pass import OnePassError
    >>> issubclass(OnePassError, RuntimeError)
    True
    """
