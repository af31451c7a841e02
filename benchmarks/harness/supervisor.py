"""Measurements in a process of their own, so that a kernel which takes it down costs one row, not the run.

An illegal access leaves a process without its GPU for good. So the one that measures notes what it is
about to call; when it ends before its work is done, another one goes on behind that.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

COMMAND = (sys.executable, "-m", "benchmarks.run")
LOST = 70  # the exit status of a process that lost its device
MOST_RESTARTS = 12
STALL_SECONDS = 150.0  # the longest that one provider may take before it is given up, compilation included
GRACE_SECONDS = 90.0  # beyond the budget, for the case that is under way


def supervise(arguments: Sequence[str], budget: float) -> int:
    """Run ``COMMAND`` with these arguments until it is done, for ``budget`` seconds; its exit status.

    What took a process down stands in the results as the error of its provider.
    """
    start, lost = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while len(lost) <= MOST_RESTARTS:
            left = max(budget - (time.monotonic() - start), 0.0)
            command = [*COMMAND, *arguments, "--budget", f"{left:.0f}", "--worker", str(folder)]
            (folder / "now.json").unlink(missing_ok=True)
            reason = _reason_to_restart(command, folder / "now.json", left)
            if isinstance(reason, int):
                return reason
            if not (folder / "now.json").exists():
                print(f"{reason} before anything was measured", file=sys.stderr)
                return 1
            lost.append({**json.loads((folder / "now.json").read_text()), "error": reason})
            print(f"{reason}: {lost[-1]}", file=sys.stderr)
            (folder / "lost.json").write_text(json.dumps(lost))
    return 1


def _reason_to_restart(command: list[str], now: Path, budget: float) -> int | str:
    """Run ``command``: its exit status if it is its own, else why it ended before its time."""
    start = time.monotonic()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(0.2)
            quiet_since = now.stat().st_mtime if now.exists() else time.time() - (time.monotonic() - start)
            if time.time() - quiet_since > STALL_SECONDS or time.monotonic() - start > budget + GRACE_SECONDS:
                process.kill()
                process.wait()
                return f"no end after {time.time() - quiet_since:.0f} s"
    if process.returncode in (0, 1, 2):
        return process.returncode
    return "the device was lost" if process.returncode == LOST else f"exit status {process.returncode}"


class Worker:
    """What a measuring process tells the one that watches it, through files in a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        path = folder / "lost.json" if folder else None
        self.lost: list[dict] = json.loads(path.read_text()) if path and path.exists() else []

    def started(self, op: str, section: str, case: str, provider: str) -> None:
        """Note what is about to be called; the file is replaced whole, so it is never half written."""
        if self.folder:
            new = self.folder / "new.json"
            new.write_text(json.dumps({"op": op, "section": section, "case": case, "provider": provider}))
            new.replace(self.folder / "now.json")

    def lost_in(self, op: str, section: str, case: str) -> dict[str, str]:
        """Providers that took a process down in this case, or twice in this section, and how."""
        here = [x for x in self.lost if (x["op"], x["section"]) == (op, section)]
        times = Counter(x["provider"] for x in here)
        return {x["provider"]: x["error"] for x in here if x["case"] == case or times[x["provider"]] > 1}
