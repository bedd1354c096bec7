"""How hypothesis drives a test here: the same examples in every run, under one path at a time."""

from hypothesis import HealthCheck, settings

many_examples = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixture `isa`
)
