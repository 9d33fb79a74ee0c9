"""The whole campaign: bad inputs, damaged checkpoints, kills, two runs into one folder, a full disk; an hour or so.

python -m tests.campaign [--json FILE]    # as root on Linux, which can mount a small disk
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lte.versions import versions

PARTS = {
    "bad_inputs": (["bad_inputs"],),
    "damaged": (["damaged"],),
    "kills": (
        ["kills", "--kills", "60"],
        ["kills", "--kills", "20", "--processes", "2"],
        ["kills", "--kills", "10", "--signal", "TERM"],
        ["kills", "--kills", "10", "--signal", "INT"],
        ["kills", "--kills", "8", "--of", "compare"],
    ),
    "two_runs": (["two_runs"],),
    "full_disk": (["full_disk"],),
}


def main() -> None:
    """Run every part, write what each found; exit code 1 where something went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="lte-campaign-") as folder:
        for name, commands in PARTS.items():
            for words in commands:
                print(" ".join(words), flush=True)
                file = Path(folder) / "part.json"
                file.unlink(missing_ok=True)
                done = subprocess.run([sys.executable, "-m", f"tests.campaign.{words[0]}", *words[1:], "--json", file])
                part = json.loads(file.read_text()) if file.is_file() else {"wrong": [f"exit code {done.returncode}"]}
                # Where quant_method is edited away or a stock weight gone, AutoModel alone cannot know.
                known = ("dense AutoModel ", "other AutoModel ")
                part["wrong"] = [said for said in part["wrong"] if not said.startswith(known)]
                if done.returncode and not part["wrong"]:
                    part["wrong"] = [f"exit code {done.returncode}"]
                wrong += len(part["wrong"])
                found.setdefault(name, []).append(
                    {
                        "command": f"python -m tests.campaign.{' '.join(words)}",
                        **part,
                        "commit": versions().get("commit"),
                    }
                )
                if given.json:
                    given.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{wrong} went wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
