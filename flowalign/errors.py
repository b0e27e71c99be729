"""The two ways a run ends badly; `cli.main` turns them into one message and an exit status."""


class UserError(Exception):
    """What the user wrote cannot work: exit status 2. The message says what to type instead."""


class RunError(Exception):
    """The run failed while running, by a reward for example: exit status 1."""
