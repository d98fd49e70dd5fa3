"The experiment notebooks with their default parameters, which must be a smoke test: an error if one fails or takes over a minute."
import re, subprocess, sys
from pathlib import Path

root, LIMIT = Path(__file__).resolve().parents[1], 60

run = subprocess.run([Path(sys.executable).with_name("nbdev_test"), "--path", "nbs/experiments", "--n_workers", "2", "--timing"],
                     cwd=root, stdout=subprocess.PIPE, text=True)
print(run.stdout, end="", flush=True)
slow = [f"{name} ({seconds} s)" for name, seconds in re.findall(r"^(\S+): (\d+) secs", run.stdout, re.M) if int(seconds) > LIMIT]
if slow: sys.exit(f"over {LIMIT} s with its default parameters: {', '.join(slow)}")
sys.exit(run.returncode)
