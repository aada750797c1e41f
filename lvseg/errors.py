"""What ends a command with a sentence instead of a traceback."""


class InputError(ValueError):
    """Input that cannot be used: one sentence saying what was expected, what came, and in which file or key.

    Commands print the sentence and exit with 2; the server sends `code` and the sentence.

    Args:
        code: stable upper-case name for programs, such as ``BAD_GEOMETRY``.
        sentence: for people; names the file or key.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str]]:
        return type(self), (self.code, self.sentence)  # crosses joblib's process border whole


class RunError(RuntimeError):
    """What ends work on good input: one sentence; commands print it and exit with 1."""
