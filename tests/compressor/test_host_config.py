from __future__ import annotations

from pathlib import Path

import pytest

from agent.contract.errors import ConfigError
from compressor.config import LoadedConfig, load_config

GOOD = """
[host]
folder = "state"
[fleet]
name = "demo"
quorum = 2
cohorts = { canary = ["w1", "w2", "w3"] }
[link]
port = 1884
"""


def load(tmp_path: Path, text: str, **environment: str) -> LoadedConfig:
    file = tmp_path / "compressor.toml"
    file.write_text(text)
    return load_config(file, environment)


def test_values_have_types_origins_and_folders_relative_to_the_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD, EDGEWARDEN_FLEET__QUORUM="3")
    assert loaded.config.host.folder == tmp_path / "state"
    assert loaded.config.fleet.quorum == 3
    assert loaded.config.cohort_of("w2") == "canary"
    assert loaded.config.cohort_of("w9") == ""
    origins = {entry.key: entry.origin for entry in loaded.explain()}
    assert origins["fleet.quorum"] == "environment EDGEWARDEN_FLEET__QUORUM"
    assert origins["link.port"] == str(tmp_path / "compressor.toml")
    assert origins["http.port"] == "default"
    assert all(entry.description for entry in loaded.explain())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[fleet]\nquorm = 2", r"unknown key 'fleet\.quorm'.*did you mean 'quorum'"),
        ("[fleeet]\nquorum = 2", "did you mean 'fleet'"),
        ("[fleet]\nquorum = 0", "fleet.quorum.*greater than or equal to 1"),
        ('[fleet]\nname = "Demo Fleet"', "fleet.name.*1 to 36"),
        ('[web]\nhost = "0.0.0.0"', "web.host"),
        ('[http]\ntls_cert = "a.pem"', "http.tls_cert and http.tls_key"),
        ('[fleet.cohorts]\na = ["w1"]\nb = ["w1"]', "w1 into a cohort twice"),
        ('[repository]\nfolder = "r"', "repository.folder and repository.keys"),
        ('[regeneration]\nrecipe = "missing.toml"', "is no file"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


def test_a_recipe_needs_a_repository_and_a_known_cohort(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(ConfigError, match=r"needs repository\.folder"):
        load(tmp_path, '[regeneration]\nrecipe = "recipe.toml"')
    with pytest.raises(ConfigError, match="'canary' is no cohort"):
        load(tmp_path, '[repository]\nfolder = "r"\nkeys = "k"\n[regeneration]\nrecipe = "recipe.toml"')
