"""What `trimtab train` says at its end."""

from typing import cast

import pytest

from actors.controller import TrainResult
from trimtab.command import DONE, Context
from trimtab.commands.offline import _report_training


def test_the_rate_is_not_said_of_the_whole_time(capsys: pytest.CaptureFixture[str]) -> None:
    result = TrainResult(
        run_id="v1",
        env_steps=12_000,
        updates=12,
        wall_s=3.0,  # with the start of the workers
        env_steps_per_s=12_000.0,  # of the second in the loop
        time_to_target_s=1.0,
        evaluation_return_mean=500.0,
        best_return_mean=500.0,
        stop_reason="target",
        parameters_sha256="ab",
        checkpoint="gen-000012",
        phases_s={},
    )
    without_a_context = cast(Context, None)  # it is only asked when the target was missed
    assert _report_training(without_a_context, result, as_json=False) == DONE
    assert "12,000 env steps in 3.0 s, 12,000/s in the loop, greedy return 500.0" in capsys.readouterr().out
