"""The one exception that a user is meant to read."""


class M3Error(Exception):
    """Bad input, said in one sentence: what is wrong, where, and the mend.

    The command line prints the sentence and exits with code 2; code that calls m3jax catches this type.
    """
