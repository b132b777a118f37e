"""A wait that runs past its deadline leaves the stacks of every process of the run behind, before any of them ends."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.crew import Crew
from actors.processes import roster
from common.errors import DeadlineError
from tests.faults import worker
from tests.faults.worker import Worker

ray.cloudpickle.register_pickle_by_value(worker)  # actors cannot import the tests

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def logs(tmp_path) -> Iterator[Path]:
    roster.open(tmp_path / "logs")
    yield tmp_path / "logs"
    roster.open(None)


def test_the_stacks_of_a_sleeping_and_of_a_stopped_actor_are_in_a_folder_that_the_error_names(logs):
    made = ray.remote(num_cpus=0.1)(Worker)
    crew = Crew("rollout", made.remote, 2, replacements=0, deadline_s=120.0)
    crew.begin()
    stopped = roster.known()["rollout-1"].pid
    try:
        crew._deadline = 2.0
        asked = [crew.ask(lambda actor: actor.work.remote(300.0, 1), number) for number in range(2)]
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(DeadlineError, match="work: 2 of 2 still missing after 2 s; what every process") as overdue:
            crew.wait(asked, "work")
        assert all(Path(f"/proc/{process.pid}").exists() for process in roster.known().values()), "nothing was ended"
    finally:
        os.kill(stopped, signal.SIGCONT)
        for actor in crew.actors:
            ray.kill(actor)
    (folder,) = logs.glob("stacks-*")
    assert f"was doing is in {folder};" in str(overdue.value)
    assert {path.name for path in folder.iterdir()} == {"driver.txt", "rollout-0.txt", "rollout-1.txt"}
    assert "work (" in (folder / "rollout-0.txt").read_text()
    assert f"process {stopped}" in (folder / "rollout-1.txt").read_text()
    assert "dump_stacks" in (folder / "driver.txt").read_text()
