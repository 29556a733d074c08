"""SCHEMA's tables are those of the fields and phases as they are declared."""

from dataclasses import fields
from pathlib import Path

from blockshock.phases import schema
from blockshock.phases.families import FAMILIES

SCHEMA = Path(__file__).parents[1] / "tools/SCHEMA.md"


def test_the_tables_of_schema_are_written_from_the_fields():
    assert schema.main(["--check", str(SCHEMA)]) == 0


def test_every_phase_and_field_of_every_family_stands_in_it():
    sections = SCHEMA.read_text().partition(schema.BEGIN)[2].split("### ")[1:]
    for name, family in FAMILIES.items():
        (section,) = (s for s in sections if s.startswith(f"{name}\n"))
        for word in (*family.phases, *(field.name for field in fields(family.case))):
            assert f"| `{word}` |" in section


def test_another_table_is_found_and_put_right(tmp_path, capsys):
    file = tmp_path / "SCHEMA.md"
    file.write_text(f"before\n{schema.BEGIN}| old |\n{schema.END}after\n")
    assert schema.main(["--check", str(file)]) == 1
    assert "is not what the cases say" in capsys.readouterr().err
    assert schema.main([str(file)]) == 0
    assert schema.main(["--check", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| old |" not in text


def test_a_file_without_markers_is_refused(tmp_path, capsys):
    (tmp_path / "SCHEMA.md").write_text("nothing\n")
    assert schema.main([str(tmp_path / "SCHEMA.md")]) == 2
    assert "has no <!-- cases -->" in capsys.readouterr().err
