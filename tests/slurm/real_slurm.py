"""sweeps/smoke.toml on a real SLURM of two one-core nodes on this machine, with processes killed, jobs
requeued and a node stopped; its rows must be those of a local sweep. As root on Debian or Ubuntu, in 10 to 20 minutes:

    python tests/slurm/real_slurm.py /tmp/slurm             installs slurm-wlm and munge, cleans up after itself
    python tests/slurm/real_slurm.py /tmp/slurm --local F   with F, the folder of a local sweep of the same commit
"""

import argparse
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [sys.executable, str(ROOT / "sweep.py"), str(ROOT / "sweeps" / "smoke.toml")]
CONF = """ClusterName=mini
SlurmctldHost={host}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
KillWait=10
SlurmdTimeout=20
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17011-17012] CPUs=1 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """SLURM's daemons; `stop` ends them and their jobs."""

    def __init__(self, folder: Path):
        if not shutil.which("slurmctld"):
            subprocess.run(["apt-get", "install", "-y", "slurm-wlm", "munge"], check=True, stdout=subprocess.DEVNULL)
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.folder, conf = folder, folder / "slurm.conf"
        conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder))
        os.environ["SLURM_CONF"] = str(conf)
        if not Path("/etc/munge/munge.key").exists():
            subprocess.run(["mungekey"], check=True)
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            subprocess.run(["su", "munge", "-s", "/bin/sh", "-c", "munged"], check=True)
        for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            subprocess.run(command, check=True)
            time.sleep(2)
        wait("two idle nodes", lambda: "2 idle" in call("sinfo", "-h", "-o", "%D %t"), 60)
        print(call("sinfo", "--version").strip(), "on", os.cpu_count(), "cores")

    def pids(self, node: str) -> list[int]:
        """slurmd of a node, its step daemons and their jobs."""
        tasks = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if on_node(pid, node)]
        return [int((self.folder / f"slurmd-{node}.pid").read_text()), *{parent(pid) for pid in tasks} - {1}, *tasks]

    def stop(self) -> None:
        for pid in self.pids("n1") + self.pids("n2"):
            kill(pid, signal.SIGCONT)
        call("scancel", "--me")
        time.sleep(15)
        for path in self.folder.glob("*.pid"):
            kill(int(path.read_text()), signal.SIGTERM)


def on_node(pid: int, node: str) -> bool:
    try:
        return f"SLURMD_NODENAME={node}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[1])
    except OSError:
        return 1


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait(what: str, condition, patience: float = 900) -> None:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > patience:
            sys.exit(f"FAILED: waited {patience:.0f} s for {what}\n{call('squeue')}{call('sinfo')}")
        time.sleep(0.3)
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", flush=True)


def running(node: str = "") -> str:
    """The number of a running job, on this node."""
    lines = [line.split() for line in call("squeue", "-h", "-r", "-t", "R", "-o", "%i %N").splitlines()]
    return next((number for number, where in lines if where.startswith(node)), "")


def waiting() -> list[str]:
    return call("squeue", "-h", "-r", "-t", "PD", "-o", "%i").split()


def trainers(node: str) -> list[int]:
    """The processes of a node that train."""
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
    return [pid for pid, path in commands.items() if on_node(pid, node) and b"--train" in path.read_bytes()]


def attempt_of(sweep: Path, number: str) -> Path:
    """The attempt that a job trains, as its log says."""
    log = sweep / "jobs" / "logs" / f"{number}_0_log.out"
    lines = log.read_text().splitlines() if number and log.exists() else []
    run, n = ([line for line in lines if ": attempt " in line] or ["none: attempt 0"])[-1].split(": attempt ")
    return sweep / "attempts" / run / n


def saved(sweep: Path, number: str) -> bool:
    """Whether the run that a job trains has a checkpoint."""
    return any(attempt_of(sweep, number).glob("*/checkpoints/step-*"))


def rows(folder: Path) -> list[dict]:
    with open(folder / "runs.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def disturb(cluster: Cluster, out: Path) -> None:
    """The sweep, with all that can go wrong on the way."""
    here, sweep = out / "smoke", [*SWEEP, f"--out={out}", "--results=none"]
    command = [*sweep, "--launcher", "slurm", "--runs-per-job=2", "--slurm", "time=30"]

    def watch(cwd: Path) -> subprocess.Popen:
        with open(out / "watch.log", "a") as log:
            return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)

    watcher = watch(ROOT)
    wait("both nodes train", lambda: trainers("n1") and trainers("n2") and saved(here, running("n2")))
    kill(trainers("n1")[0], signal.SIGKILL)
    print("killed a process that trains (kill -9)")
    frozen, asleep, attempt = cluster.pids("n2"), set(trainers("n2")), attempt_of(here, running("n2"))
    for pid in frozen:
        kill(pid, signal.SIGSTOP)
    print(f"stopped all {len(frozen)} processes of n2 (kill -STOP), which trained {attempt.parent.name}")
    watcher.kill()
    watcher.wait()
    print("killed the sweep's process (kill -9), and started another in another folder")
    watcher = watch(out)
    wait("n1 trains", lambda: trainers("n1") and saved(here, running("n1")))
    number = running("n1")
    signalled = subprocess.Popen(["scancel", "--quiet", "--signal=USR2", number])  # tries again while the job waits
    print(f"job {number}: the signal before a preemption")
    wait(f"job {number} waits again, by submitit", lambda: number in waiting())
    signalled.kill()
    wait("n1 trains", lambda: trainers("n1") and saved(here, running("n1")))
    number = running("n1")
    call("scontrol", "requeue", number)
    print(f"job {number}: scontrol requeue")
    wait(f"job {number} waits again", lambda: number in waiting())
    wait("SLURM has noticed that n2 is down", lambda: "down" in call("sinfo", "-h", "-n", "n2", "-o", "%t"))
    wait(f"another job has taken over {attempt.parent.name}", lambda: not attempt.exists())
    for pid in frozen:
        kill(pid, signal.SIGCONT)
    print("n2 wakes up (kill -CONT)")
    wait("the processes that slept have ended", lambda: not asleep & set(trainers("n2")))
    print("--status:", *[line for line in call(*sweep, "--status").splitlines() if "finished" not in line], sep="\n  ")
    print("--cancel:", call(*sweep, "--cancel").strip())
    wait("the sweep's process has ended, too", lambda: watcher.poll() is not None)
    wait("no job is left", lambda: not call("squeue", "-h"))
    watcher = watch(ROOT)
    wait("the sweep is done", lambda: watcher.poll() is not None, 3600)
    if watcher.returncode:
        sys.exit(f"FAILED: exit code {watcher.returncode}; see {out}/watch.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local", type=Path)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    folder, local = options.folder.resolve(), options.local
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, commit {call('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD').strip()}"
    )
    if local is None:
        local = folder / "local" / "smoke"
        subprocess.run([*SWEEP, f"--out={folder}/local", "--results=none"], check=True, stdout=subprocess.DEVNULL)
        print("the local sweep is done")
    cluster, out = Cluster(folder), folder / "out"
    out.mkdir()
    try:
        disturb(cluster, out)
    finally:
        cluster.stop()
    mine, theirs = rows(out / "smoke"), rows(local)
    same = mine == theirs and (out / "smoke/curves.csv.gz").read_bytes() == (local / "curves.csv.gz").read_bytes()
    arrays = len(list((out / "smoke" / "jobs").glob("[0-9]*.json")))
    print(f"{len(mine)} runs in {arrays} arrays; rows and curves are those of the local sweep: {same}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
