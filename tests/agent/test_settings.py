from pathlib import Path

import pytest

from agent.contract.errors import ConfigError
from agent.settings import read_settings


def write(folder: Path, text: str, **drop_ins: str) -> Path:
    file = folder / "agent.toml"
    file.write_text(text)
    (folder / "agent.toml.d").mkdir(exist_ok=True)
    for name, body in drop_ins.items():
        (folder / "agent.toml.d" / f"{name}.toml").write_text(body)
    return file


def test_later_layers_win_and_every_value_keeps_its_origin(tmp_path: Path) -> None:
    file = write(tmp_path, "[link]\nhost = 'a'\nport = 1\n", b="[link]\nport = 3\n", a="[link]\nport = 2\n")
    settings = read_settings(file, {"EDGEWARDEN_LINK__USERNAME": "me", "EDGEWARDEN_HOME": "/x", "PATH": "/bin"})
    assert settings.values == {"link": {"host": "a", "port": 3, "username": "me"}}
    assert settings.origin("link", "host") == str(file)
    assert settings.origin("link", "port").endswith("agent.toml.d/b.toml")
    assert settings.origin("link", "username") == "environment EDGEWARDEN_LINK__USERNAME"
    assert settings.origin("link", "keepalive_s") == "default"


def test_a_drop_in_changes_one_service_by_its_name(tmp_path: Path) -> None:
    text = "[[service]]\nname = 'a'\nthreads = 1\n[[service]]\nname = 'b'\nthreads = 1\n"
    settings = read_settings(write(tmp_path, text, x="[[service]]\nname = 'b'\nthreads = 4\n"), {})
    assert settings.values["service"] == [{"name": "a", "threads": 1}, {"name": "b", "threads": 4}]
    assert "x.toml" in settings.origin("service", 1, "threads")
    assert settings.look_up("service", 1, "threads") == 4
    assert settings.look_up("service", 7, "threads") is None


def test_the_environment_reaches_into_a_service_and_gives_lists(tmp_path: Path) -> None:
    file = write(tmp_path, "[[service]]\nname = 'a'\nfallbacks = ['x']\n")
    environment = {"EDGEWARDEN_SERVICE__0__FALLBACKS": '["y", "z"]', "EDGEWARDEN_SERVICE__0__DEADLINE_MS": "5"}
    assert read_settings(file, environment).values["service"] == [
        {"name": "a", "fallbacks": ["y", "z"], "deadline_ms": "5"}
    ]


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none.toml: No such file") as caught:
        read_settings(tmp_path / "none.toml", {})
    assert "--config" in caught.value.hint


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agent.toml is not valid TOML: .*line 2"):
        read_settings(write(tmp_path, "[link]\nhost = \n"), {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("EDGEWARDEN_LINK__TLS", "[1"), ("EDGEWARDEN_SERVICE__9__NAME", "x"), ("EDGEWARDEN_LINK__HOST__NAME", "x")],
)
def test_an_environment_variable_that_does_not_fit_is_refused(tmp_path: Path, name: str, value: str) -> None:
    file = write(tmp_path, "[link]\nhost = 'a'\n[[service]]\nname = 'a'\n")
    if name.endswith("HOST__NAME"):
        assert read_settings(file, {name: value}).values["link"] == {"host": {"name": "x"}}  # the checker refuses it
        return
    with pytest.raises(ConfigError, match=name):
        read_settings(file, {name: value})


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_settings(tmp_path / "agent.toml", {})
