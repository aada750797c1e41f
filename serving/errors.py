"""What ends a client's request, and the exit codes of its command."""

from __future__ import annotations

EXIT_DONE, EXIT_ERROR, EXIT_BAD_INPUT, EXIT_NETWORK = 0, 1, 2, 4


class ClientError(Exception):
    """What ends a request: a stable code, a sentence for people, and the exit code of the command.

    Args:
        code: the server's, or of this side NOT_FOUND, NOT_READABLE, INPUT_TRUNCATED, TOO_LARGE, TEMPORARY_FULL,
            BAD_ARGUMENT, BAD_ADDRESS, BAD_KEY, BAD_OUTPUT, MODEL_UNKNOWN, SCAN_CHANGED, UNREACHABLE, TIMEOUT,
            RESULT_CORRUPT, SERVER_KEY_MISMATCH, NOT_AUTHORISED.
        sentence: what was expected, what came, what to check.
        exit_code: EXIT_BAD_INPUT, EXIT_NETWORK or EXIT_ERROR.
    """

    def __init__(self, code: str, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence
        self.exit_code = exit_code


class KeyFileError(ValueError):
    """A file with keys that cannot be used, or may not be written; `sentence` says why."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class KeyFileUnreadable(KeyFileError):
    """The system cannot read such a file, or this user may not: nothing is known of what it says."""
