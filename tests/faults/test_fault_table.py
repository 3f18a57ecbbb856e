"""The table of docs/faults.md names the files that really test each fault."""

import ast
import pathlib
import re

TESTS = pathlib.Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"


def marked():
    """``{fault: {file, ...}}`` from every ``pytest.mark.fault(...)`` in the tests."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found.setdefault(node.args[0].value, set()).add(path.name)
    return found


def test_the_table_is_what_the_marks_say():
    rows = re.findall(r"^\| (F\d\d) \|.*\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    named = {fault: set(re.findall(r"`(\w+\.py)`", files)) for fault, files in rows}
    assert list(named) == [f"F{number:02d}" for number in range(1, 45)]
    assert {fault: files for fault, files in named.items() if files} == marked()


def test_at_least_forty_faults_are_tested():
    assert len(marked()) >= 40
