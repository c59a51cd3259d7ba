"""Whose ledger is whose must survive everything."""

import json
from pathlib import Path

import pytest

from fedpeft.errors import RunError
from server.allowlist import AllowList
from server.slots import Slots


def _allow(path: Path, *names: str) -> AllowList:
    path.write_text("[clients]\n" + "".join(f"{name} = []\n" for name in names))
    return AllowList(path)


def test_names_take_places_in_the_lists_order_and_keep_them(tmp_path: Path) -> None:
    file, places = tmp_path / "clients.toml", tmp_path / "run" / "clients.json"
    slots = Slots(places, _allow(file, "north", "east"), 3)
    assert (slots.index("north"), slots.index("east")) == (0, 1)
    # Another order, a name gone, two new ones: who had a place keeps it.
    slots = Slots(places, _allow(file, "west", "north", "south"), 3)
    assert [slots.index(n) for n in ("north", "west", "south")] == [0, 2, None]
    assert slots.name(1) == "east"


def test_a_name_that_is_added_while_the_run_goes_on_gets_a_place(
    tmp_path: Path,
) -> None:
    file = tmp_path / "clients.toml"
    slots = Slots(tmp_path / "clients.json", _allow(file, "north"), 2)
    assert slots.index("a-name-that-comes-later") is None
    assert slots.name(1) == "client 1"
    _allow(file, "north", "a-name-that-comes-later")
    assert slots.index("a-name-that-comes-later") == 1


def test_places_that_are_lost_in_the_middle_of_a_run_are_not_given_anew(
    tmp_path: Path,
) -> None:
    with pytest.raises(RunError, match="Restore it"):
        Slots(
            tmp_path / "clients.json",
            _allow(tmp_path / "c.toml", "a"),
            2,
            is_expected=True,
        )


def test_a_revoked_name_keeps_its_place_and_is_known_as_gone(tmp_path: Path) -> None:
    file = tmp_path / "clients.toml"
    slots = Slots(tmp_path / "clients.json", _allow(file, "north", "east"), 2)
    assert slots.revoked() == set()
    _allow(file, "east")
    assert slots.revoked() == {0}


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"a": 1}), '{"a": "b"}'])
def test_places_that_were_damaged_are_not_guessed(tmp_path: Path, text: str) -> None:
    (tmp_path / "clients.json").write_text(text)
    with pytest.raises(RunError, match="restore it"):
        Slots(tmp_path / "clients.json", _allow(tmp_path / "c.toml", "a"), 2)
