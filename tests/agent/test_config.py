from pathlib import Path

import pytest

from agent.config import AgentConfig, LoadedConfig, absent_artifacts, load_config
from agent.contract.errors import ConfigError

SERVICE = "[[service]]\nname = 'wrist'\nartifact = 'models/wrist'\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models/wrist").mkdir(parents=True)
    (tmp_path / "models/wrist/manifest.json").write_text("{}")
    return tmp_path


def load(
    folder: Path, text: str = "", *, service: str = SERVICE, environment: dict[str, str] | None = None
) -> LoadedConfig:
    (folder / "agent.toml").write_text(text + service)
    return load_config(folder / "agent.toml", environment or {})


def test_a_service_is_all_one_must_write(folder: Path) -> None:
    config = load(folder).config
    assert config.service[0].artifact == folder / "models/wrist"
    assert config.link.enabled is False
    assert config.admin_socket == Path("/var/lib/edgewarden/admin.sock")
    assert config.device.id


def test_relative_paths_start_at_the_file_and_absolute_ones_stay(folder: Path) -> None:
    config = load(folder, "[state]\nfolder = 'state'\n[link]\npassword_file = '/etc/pw'\ntls_ca = 'system'\n").config
    assert config.state.folder == folder / "state"
    assert config.admin_socket == folder / "state/admin.sock"
    assert (config.link.password_file, config.link.tls_ca) == ("/etc/pw", "system")


def test_an_unknown_key_names_the_nearest_one_and_the_file(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'link.hots' in .*agent.toml \(did you mean 'host'\)"):
        load(folder, "[link]\nhots = 'x'\n")
    with pytest.raises(ConfigError, match=r"unknown key 'lnik' in .*agent.toml \(did you mean 'link'\)"):
        load(folder, "[lnik]\nhost = 'x'\n")
    with pytest.raises(ConfigError, match=r"unknown key 'artefact' of \[\[service\]\] number 1 in .*'artifact'"):
        load(folder, service=SERVICE + "artefact = 'x'\n")


def test_an_unknown_key_far_from_all_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'clock.zzzz'.*known: source"):
        load(folder, "[clock]\nzzzz = 1\n")


def test_a_wrong_type_names_key_place_and_value(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'link.port' in environment EDGEWARDEN_LINK__PORT: .*'http'"):
        load(folder, environment={"EDGEWARDEN_LINK__PORT": "http"})


def test_text_from_the_environment_becomes_the_keys_type(folder: Path) -> None:
    environment = {"EDGEWARDEN_LINK__PORT": "8883", "EDGEWARDEN_LINK__ENABLED": "true", "EDGEWARDEN_DEVICE__ID": "42"}
    config = load(folder, environment=environment).config
    assert (config.link.port, config.link.enabled, config.device.id) == (8883, True, "42")


def test_several_mistakes_are_told_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"link.port.*telemetry.interval_s"):
        load(folder, "[link]\nport = 0\n[telemetry]\ninterval_s = -1\n")


@pytest.mark.parametrize(
    ("text", "service", "message"),
    [
        ("", "", "configures no service"),
        ("", "[[service]]\nname = 'wrist'\n", r"'artifact' of \[\[service\]\] number 1 is missing"),
        ("", SERVICE + "fallbacks = ['x', 3]\n", r"'fallbacks' number 2 of \[\[service\]\] number 1 in "),
        ("[serving]\ntcp = '127.0.0.1:65536'\n", SERVICE, "the port must be at most 65535"),
        ("[serving]\ntcp = '127.0.0.1'\n", SERVICE, "'serving.tcp' in "),
        ("", SERVICE.replace("'wrist'", "'Wrist One'"), "1 to 36 characters"),
        ("[link]\ntls_key = 'k'\n", SERVICE, "belong together"),
        ("[fallback]\nfailures = 30\n", SERVICE, "cannot be more"),
        ("[serving]\nunix_mode = '660'\n", SERVICE, "serving.unix_mode"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(folder: Path, text: str, service: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder, text, service=service)


def test_more_mistakes_than_one_can_read_are_counted_and_the_reference_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"; and 2 more\n") as told:
        load(folder, "[link]\n" + "".join(f"x{number} = 1\n" for number in range(7)))
    assert "docs/reference/agent-config.md" in told.value.sentence()
    with pytest.raises(ConfigError) as told:
        load(folder, "[link]\nhots = 'x'\n")
    assert "?" not in told.value.sentence()


def test_a_folder_without_an_artifact_is_no_mistake_of_the_configuration_but_told(folder: Path) -> None:
    loaded = load(folder, service=SERVICE + "fallbacks = ['gone']\n")
    assert absent_artifacts(loaded) == [
        f"service 'wrist' in {folder}/agent.toml: {folder}/gone holds no artifact"
    ]  # fmt: skip
    assert absent_artifacts(load(folder)) == []


def test_every_key_has_a_description_and_an_origin(folder: Path) -> None:
    rows = {row.key: row for row in load(folder, "[link]\nhost = 'h'\n").explain()}
    assert rows["link.host"].value == '"h"'
    assert rows["link.host"].origin.endswith("agent.toml")
    assert rows["link.port"].origin == "default"
    assert rows["service.0.name"].value == '"wrist"'
    assert all(row.description for row in rows.values())
    sections = [name for name in AgentConfig.model_fields if name != "service"]
    assert all(any(key.startswith(f"{name}.") for key in rows) for name in sections)
