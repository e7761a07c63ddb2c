"""The launchers, as far as one machine can tell: their syntax, the decisions they make, the manifest's schema."""

from __future__ import annotations

import copy
import getpass
import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.kuberay_schema import KINDS
from torchspec.config.load import parse_config

LAUNCH = Path(__file__).parents[2] / "configs" / "launch"
SCRIPTS = ("ray_start.sh", "slurm.sbatch")


def program(folder: Path, name: str, body: str) -> None:
    """An executable that writes down how it was called, then does ``body``."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path):
    """A folder of fake programs, and the environment in which they are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "calls").touch()
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "TORCHSPEC_BIN": str(folder)}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_TMPDIR"):
        environment.pop(name, None)
    return folder, environment


def calls(folder: Path, name: str) -> list[str]:
    lines = (folder.parent / "calls").read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True).stderr == ""


# ---- ray start ----


def ray_start(programs, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    folder, environment = programs
    program(folder, "ray", "[[ $1 != get-auth-token ]] || { mkdir -p ~/.ray && echo secret >~/.ray/auth_token; }")
    command = [LAUNCH / "ray_start.sh", *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True)


def test_a_head_makes_the_token_and_binds_the_named_interface(programs):
    done = ray_start(programs, "head", "--block", TORCHSPEC_INTERFACE="lo", TORCHSPEC_ROLES="training")
    assert done.returncode == 0, done.stderr
    generate, start = calls(programs[0], "ray")
    assert generate == "get-auth-token --generate"
    assert "--node-ip-address=127.0.0.1 --port=6379 --dashboard-host=127.0.0.1" in start
    assert start.endswith('--resources={"torchspec_training": 1} --block')
    assert "worker 127.0.0.1:6379" in done.stdout and "secret" not in done.stdout + done.stderr
    assert token_modes(programs) == [0o700, 0o600]


def token_modes(programs) -> list[int]:
    """Of the folder and the file."""
    ray = programs[0].parent / ".ray"
    return [stat.S_IMODE(path.stat().st_mode) for path in (ray, ray / "auth_token")]


@pytest.mark.parametrize("arguments", [("head",), ("worker", "127.0.0.1:7000")])
def test_a_token_that_others_can_read_is_closed(programs, arguments):
    token = programs[0].parent / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text("secret")
    assert ray_start(programs, *arguments, TORCHSPEC_INTERFACE="lo").returncode == 0
    assert token_modes(programs) == [0o700, 0o600]


def test_a_worker_finds_its_address_towards_the_head_and_has_both_roles_unless_told(programs):
    done = ray_start(programs, "worker", "127.0.0.1:7000", RAY_AUTH_TOKEN="secret")
    assert done.returncode == 0, done.stderr
    (start,) = calls(programs[0], "ray")
    assert "--address=127.0.0.1:7000 " in start and "--node-ip-address=127.0.0.1" in start
    assert start.endswith('--resources={"torchspec_inference": 1,"torchspec_training": 1}')


@pytest.mark.parametrize("arguments", [("head",), ("worker", "127.0.0.1:7000")])
def test_ray_keeps_its_session_where_nobody_else_can_write(programs, arguments):
    options = {"TORCHSPEC_INTERFACE": "lo", "RAY_AUTH_TOKEN": "secret"}
    folder = programs[0].parent / f"ray-{getpass.getuser()}"
    folder.mkdir(mode=0o777)
    assert ray_start(programs, *arguments, **options).returncode == 0
    (start,) = calls(programs[0], "ray")
    assert f"--temp-dir={folder} " in start and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(programs[0])
    done = ray_start(programs, *arguments, **options)
    assert done.returncode == 2 and "somebody else's" in done.stderr and len(calls(programs[0], "ray")) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["worker"], {}, "HOST:PORT"),
        (["worker", "127.0.0.1:1"], {}, "no token"),
        (["worker", "127.0.0.1:1"], {"TORCHSPEC_ROLES": "cooking"}, "valid: inference, training"),
        (["dance"], {}, "usage"),
    ],
)
def test_mistakes_are_told(programs, arguments, variables, message):
    done = ray_start(programs, *arguments, **variables)
    assert done.returncode == 2 and message in done.stderr and not calls(programs[0], "ray")


def test_a_worker_joins_again_when_its_node_was_in_the_cluster_and_gives_up_when_it_never_gets_there(programs):
    folder, environment = programs
    command = [LAUNCH / "ray_start.sh", "worker", "127.0.0.1:7000", "--block"]
    environment |= {"RAY_AUTH_TOKEN": "secret", "TORCHSPEC_WAIT": "1"}
    program(
        folder, "ray", '(($(grep -c "^ray start" "$CALLS") > 1)) || { echo Ray runtime started.; sleep 2; exit 1; }'
    )
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert len(calls(folder, "ray")) == 2
    (folder.parent / "calls").write_text("")
    program(folder, "ray", "sleep 2; exit 1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no node could be started for the cluster at 127.0.0.1:7000" in done.stderr
    assert len(calls(folder, "ray")) == 1


# ---- Slurm ----

TORCHSPEC = """
echo "token $(stat -c "%a %s" "$RAY_AUTH_TOKEN_PATH")" >>"$CALLS"
until (($(grep -c "^ray start" "$CALLS") >= ${AWAIT:-0})); do sleep 0.05; done
n=$(grep -c ^torchspec "$CALLS")
code=$(sed -n "${n}p" "$PLAN")
if [[ $code == long* ]]; then
  trap 'echo stopping >>"$CALLS"; sleep 0.3; exit "${code#long}"' TERM
  echo started >>"$CALLS"
  while true; do sleep 0.05; done
fi
exit "$code"
"""


HEAD = "127.0.0.1:20007"


class Slurm:
    """A Slurm of fake programs: ``srun`` starts what it is given once, whatever the node."""

    def __init__(self, programs, nodes: int, **variables: str):
        self.folder, environment = programs
        self.where = self.folder.parent
        program(self.folder, "torchspec", TORCHSPEC)
        program(self.folder, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        all_nodes = f'[[ $3 == "n[0-2]" ]] && yes localhost | head -{nodes}'
        program(self.folder, "scontrol", f"[[ $1 != show ]] || {{ {all_nodes} || echo another; }}")
        program(self.folder, "squeue", 'echo "$LEFT"')
        program(self.folder, "ray", "[[ $* == *--head* || -z $LEFT ]] || exit 1; exec sleep 600")
        self.environment = environment | {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[0-2]",
            "SLURM_SUBMIT_DIR": str(self.where),
            "TORCHSPEC_HOME": str(LAUNCH.parents[1]),
            "TORCHSPEC_INTERFACE": "lo",
            "PLAN": str(self.where / "plan"),
            "LEFT": "",
            **variables,
        }

    def start(self) -> subprocess.Popen[str]:
        command = [LAUNCH / "slurm.sbatch", "recipe.yaml", "run.name=x"]
        return subprocess.Popen(command, env=self.environment, cwd=self.where, text=True, start_new_session=True)

    def run(self, *codes: int | str) -> list[int]:
        """Exit codes of the job's starts: ``codes`` are those of torchspec; it starts again as often as requeued."""
        (self.where / "plan").write_text("\n".join(map(str, codes)) + "\n")
        results = []
        while not results or self.requeues() == len(results):
            results.append(self.start().wait(60))
        return results

    def requeues(self) -> int:
        return calls(self.folder, "scontrol").count("requeue 7")

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 60
        while line not in (self.where / "calls").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_ray_is_started_on_every_node_by_role(programs):
    slurm = Slurm(programs, nodes=3, AWAIT="2")
    assert slurm.run(0) == [0]
    steps = calls(programs[0], "srun")
    assert sorted(step.split(" --block")[0].split("/")[-1] for step in steps) == [
        "ray_start.sh head",
        f"ray_start.sh worker {HEAD}",
    ]
    assert sorted(step.split("--ntasks=")[1][0] for step in steps) == ["1", "2"]
    head, workers = sorted(calls(programs[0], "ray"), key=lambda line: "--head" not in line)
    assert '"torchspec_training": 1' in head and "inference" not in head
    assert '"torchspec_inference": 1' in workers and "training" not in workers
    (driver,) = calls(programs[0], "torchspec")
    assert driver.startswith(f"train recipe.yaml --or-resume --address {HEAD} run.name=x cluster.nodes=3")
    assert calls(programs[0], "token") == ["600 64"]
    assert not (slurm.where / ".torchspec-7.token").exists(), "it is of no use to anybody any more"


@pytest.mark.parametrize("code", [1, 134, 137, 139])
def test_failures_and_kills_are_requeued_three_times_in_a_row(programs, code):
    slurm = Slurm(programs, nodes=1)
    assert slurm.run(*[code] * 4) == [code] * 4 and slurm.requeues() == 3
    assert not (slurm.where / ".torchspec-7.token").exists()


@pytest.mark.parametrize("code", [2, 130])
def test_mistakes_and_interrupts_are_never_requeued(programs, code):
    slurm = Slurm(programs, nodes=1)
    assert slurm.run(code) == [code] and slurm.requeues() == 0


def test_a_good_end_forgets_earlier_failures(programs):
    slurm = Slurm(programs, nodes=1)
    assert slurm.run(1, 1, 0) == [1, 1, 0]
    assert not (slurm.where / ".torchspec-7.failures").exists()


USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize(("numbers", "requeues"), [([USR1], 1), ([TERM], 0), ([USR1, TERM], 0), ([TERM, USR1], 0)])
def test_before_the_time_limit_the_job_is_requeued_and_after_a_cancellation_never(programs, numbers, requeues, code):
    """On SIGTERM the run stops too, well or not, but whether it starts again is for Slurm to say."""
    slurm = Slurm(programs, nodes=1)
    (slurm.where / "plan").write_text(f"long{code}\n")
    job = slurm.start()
    slurm.wait_for("started")
    for number in numbers:
        job.send_signal(number)
        slurm.wait_for("stopping")
    assert job.wait(60) == code
    assert slurm.requeues() == requeues


@pytest.mark.parametrize(("left", "requeues"), [("n[1-2]", 1), ("n[0-2]", 0)])
def test_a_worker_that_has_lost_the_head_has_the_job_requeued_if_its_node_is_gone(programs, left, requeues):
    slurm = Slurm(programs, nodes=3, LEFT=left, TORCHSPEC_WAIT="0")
    (slurm.where / "plan").write_text("long0\n")
    job = slurm.start()
    slurm.wait_for("started")
    slurm.wait_for(f"scontrol show hostnames {left}\n")
    slurm.wait_for("scontrol requeue" if requeues else "squeue")
    assert slurm.requeues() == requeues
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert slurm.requeues() == requeues and all("--no-kill" in step for step in calls(slurm.folder, "srun"))


def test_nothing_of_a_job_is_left(programs):
    slurm = Slurm(programs, nodes=3)
    (slurm.where / "plan").write_text("0\n")
    job = slurm.start()
    assert job.wait(60) == 0
    deadline = time.monotonic() + 10
    while (left := subprocess.run(["pgrep", "-s", str(job.pid)], capture_output=True, text=True).stdout.split()) != []:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


# ---- KubeRay ----


@pytest.fixture(scope="module")
def documents():
    return {document["kind"]: document for document in yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text())}


def test_the_manifest_is_what_the_operator_reads(documents):
    assert set(documents) == set(KINDS)
    for kind, document in documents.items():
        jsonschema.validate(document, KINDS[kind])
    broken = copy.deepcopy(documents["RayJob"])
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(broken, KINDS["RayJob"])


def test_its_recipe_is_valid_and_its_groups_offer_the_roles_and_room(documents):
    job = documents["RayJob"]["spec"]
    recipe = documents["ConfigMap"]["data"]["recipe.yaml"]
    config = parse_config(yaml.safe_load(recipe))
    cluster = job["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    offered = {name for g in groups for name in json.loads(json.loads(g["rayStartParams"]["resources"]))}
    assert offered == {config.cluster.inference_resource, config.cluster.training_resource}
    assert config.cluster.nodes == 1 + sum(group["replicas"] for group in groups)
    assert {group["groupName"]: group["replicas"] for group in groups} == {
        "inference": config.inference.workers,
        "training": config.training.world_size,
    }
    assert job["backoffLimit"] >= 3 and "--or-resume" in job["entrypoint"]
    for group in (cluster["headGroupSpec"], *groups):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes >= {"shared", "shm"}


def test_only_pods_of_the_run_reach_each_other_and_others_the_dashboard_which_asks_for_the_token(documents):
    cluster, policy = documents["RayJob"]["spec"]["rayClusterSpec"], documents["NetworkPolicy"]["spec"]
    ours = policy["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert ours.items() <= group["template"]["metadata"]["labels"].items()
    among_us, dashboard = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"] and among_us == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert dashboard == {"ports": [{"port": 8265, "protocol": "TCP"}]} and cluster["authOptions"] == {"mode": "token"}
