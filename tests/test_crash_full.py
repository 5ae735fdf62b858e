"""The full crash injection: kill -9 at 60 random moments of a run through all stages.

After each, nothing that looks finished may be broken, and the run that goes on must end with the
bytes and the score of the undisturbed one. test_faults.py holds the short form, at named points.
"""

import random
import signal
import time

import pytest
from test_faults import OFTEN, RESUME, complete, products

KILLS = 60
# The search for the finest steps, validation on the way and both scores belong to it.
FULL = dict(OFTEN, RUN_ID="x", ITERATIONS=8, VAL_LOSS_EVERY=4, EVAL_STRIDE=32,
            GPTQ_CALIBRATION_BATCHES=4)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(nursery, tiny_env, tmp_path):
    env, rng, killed = {**tiny_env, **FULL}, random.Random(8), []
    whole = tmp_path / "whole"
    whole.mkdir()
    run = nursery.run(env, whole)
    assert run.rc == 0, run.stderr
    expected = complete(whole)
    for i in range(KILLS):
        cwd = tmp_path / str(i)
        cwd.mkdir()
        child = nursery.start(env, cwd)
        time.sleep(run.seconds * (i + rng.random()) / KILLS)  # spread over the whole run
        child.kill()
        killed.append(child.wait().rc == -signal.SIGKILL)
        found = products(cwd)
        assert found == {name: expected[name] for name in found}, "what looks finished is so"
        again = nursery.run({**env, **RESUME}, cwd)
        assert again.rc == 0, again.stderr
        assert products(cwd) == expected, f"killed at moment {i}"
    print(f"{sum(killed)} of {KILLS} runs were killed before their end")
    assert sum(killed) >= 50
