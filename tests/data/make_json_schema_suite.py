"""Pack the required draft 2020-12 tests of the official JSON Schema Test Suite into one file.

    python make_json_schema_suite.py SUITE/tests/draft2020-12

The suite is at github.com/json-schema-org/JSON-Schema-Test-Suite, MIT licence: its text is kept
beside the file. The copy here is the one in the source package of jsonschema 4.25.1, folder
``json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def packed(folder: Path) -> str:
    """Return all test groups by the name of their file, a line each."""
    files = []
    for path in sorted(folder.glob("*.json")):
        groups = [
            {
                "description": group["description"],
                "schema": group["schema"],
                "tests": [[case["data"], case["valid"]] for case in group["tests"]],
            }
            for group in json.loads(path.read_text(encoding="utf-8"))
        ]
        lines = ",\n".join([json.dumps(group, separators=(",", ":")) for group in groups])
        files.append(f"{json.dumps(path.stem)}:[\n{lines}]")
    return "{" + ",\n".join(files) + "}\n"


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "json_schema_suite.json").write_text(packed(Path(sys.argv[1])), encoding="utf-8")
