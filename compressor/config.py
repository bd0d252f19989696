"""HostConfig: every setting of `edgewarden-compressor serve`, checked once and frozen.

    compressor.toml  <  compressor.toml.d/*.toml (by name)  <  EDGEWARDEN_SECTION__KEY

Units stand in the names. Unknown keys are refused with the nearest known name. Relative paths start at the folder
of the configuration file. What a value means is its `description`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from agent.configuring import CaSource, FilePath, Identifier, Loaded, OptionalPath, Section, check_pair, load
from agent.contract.errors import ConfigError
from agent.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class HostSection(Section):
    folder: FilePath = Field(
        default=Path("/var/lib/edgewarden-host"), description="Where the host keeps database, samples and builds."
    )


class LinkSection(Section):
    host: str = Field(default="localhost", min_length=1, description="Broker's host name or address.")
    port: int = Field(default=1883, ge=1, le=65535, description="Broker's port (8883 with TLS).")
    username: str = Field(default="", description="User name at the broker; empty = none.")
    password_file: OptionalPath = Field(default="", description="File holding the password.")
    tls_ca: CaSource = Field(default="", description="CA certificates (PEM), or `system`; set = TLS.")
    tls_cert: OptionalPath = Field(default="", description="The host's certificate (PEM), for mutual TLS.")
    tls_key: OptionalPath = Field(default="", description="Its key (PEM).")
    prefix: str = Field(default="ew", description="First part of every topic.")
    keepalive_s: int = Field(default=30, ge=5, le=3600, description="MQTT keep-alive.")
    session_s: int = Field(
        default=7 * 86_400, ge=0, le=30 * 86_400, description="How long the broker keeps messages while we are away."
    )


class FleetSection(Section):
    name: Identifier = Field(default="default", description="The fleet this host serves.")
    cohorts: dict[Identifier, list[Identifier]] = Field(
        default={},
        max_length=32,
        description="Groups of devices that see the same world; `canary` gets updates first.",
    )
    quorum: int = Field(default=2, ge=1, le=1000, description="So many devices must say the same before a training.")
    persisted_windows: int = Field(
        default=64, ge=1, le=1_000_000, description="A drift counts when it lasted so many windows."
    )
    least_shift: float = Field(
        default=0.1, ge=0, description="A claimed drift must move a feature by so many reference deviations."
    )
    patience_s: float = Field(
        default=60.0, ge=0, description="A first report waits so long for others before it is asked alone."
    )
    collect_s: float = Field(
        default=300.0, ge=0, description="After the last request, other devices may join for so long."
    )
    sample_timeout_s: float = Field(
        default=3600.0, gt=0, description="A request for recordings is given up after this."
    )
    max_messages_per_day: int = Field(
        default=200_000, ge=0, description="Per device; what is over is refused. 0 = no limit."
    )


class HttpSection(Section):
    host: str = Field(default="127.0.0.1", min_length=1, description="Address the device side listens on.")
    port: int = Field(default=8700, ge=0, le=65535, description="Its port; 0 = any free one.")
    public_url: str = Field(
        default="",
        pattern=r"^$|^https?://[^\s?#]+$",
        description="How devices reach it; default: from host and port.",
    )
    tls_cert: OptionalPath = Field(default="", description="Certificate (PEM) of the device side; set = TLS.")
    tls_key: OptionalPath = Field(default="", description="Its key (PEM).")
    max_sample_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1024, le=1 << 30, description="Largest recording a device may upload."
    )
    max_samples_bytes: int = Field(
        default=4 * 1024 * 1024 * 1024, ge=1024, description="All recordings together; further ones are refused."
    )


class WebSection(Section):
    enabled: bool = Field(default=True, description="Serve the page.")
    host: Literal["127.0.0.1", "::1", "localhost"] = Field(
        default="127.0.0.1", description="The page is for this machine; reach it from elsewhere through a tunnel."
    )
    port: int = Field(default=8701, ge=0, le=65535, description="Its port; 0 = any free one.")
    token_file: OptionalPath = Field(
        default="", description="Token for what changes state; default: made in host.folder at the first start."
    )


class RepositorySection(Section):
    folder: OptionalPath = Field(default="", description="Update repository; empty = nothing is published.")
    keys: OptionalPath = Field(default="", description="Folder of the keys this host signs with.")
    refresh_s: float = Field(
        default=3600.0, gt=0, description="How often the online metadata are signed again when near their end."
    )


class RegenerationSection(Section):
    recipe: OptionalPath = Field(default="", description="Recipe of the pipeline; empty = nothing is regenerated.")
    service: Identifier = Field(default="default", description="The service that the recipe builds.")
    cohort: Identifier = Field(default="canary", description="Who reports, delivers recordings and gets the result.")
    device_class: str = Field(
        default="", description="Which of the recipe's classes goes out; default: the only one."
    )
    cache: FilePath = Field(default=Path("build/cache"), description="Cache of finished stages.")
    settings: list[str] = Field(default=[], max_length=64, description="Further KEY=VALUE for the recipe.")
    budget_per_day: int = Field(default=2, ge=0, le=1000, description="Trainings that may start in 24 hours.")
    timeout_s: float = Field(default=4 * 3600.0, gt=0, description="A pipeline that runs longer is ended.")
    update_deadline_s: float = Field(
        default=3600.0, gt=0, description="A device that has not committed an update by then halts the rollout."
    )
    soak_s: float = Field(default=600.0, ge=0, description="A finished rollout is watched this long.")


class HostConfig(Section):
    """The whole configuration of one host."""

    host: HostSection = Field(default_factory=HostSection)
    link: LinkSection = Field(default_factory=LinkSection)
    fleet: FleetSection = Field(default_factory=FleetSection)
    http: HttpSection = Field(default_factory=HttpSection)
    web: WebSection = Field(default_factory=WebSection)
    repository: RepositorySection = Field(default_factory=RepositorySection)
    regeneration: RegenerationSection = Field(default_factory=RegenerationSection)

    def cohort_of(self, device: str) -> str:
        """The first cohort that lists this device; "" = none."""
        return next((name for name, members in self.fleet.cohorts.items() if device in members), "")


LoadedConfig = Loaded[HostConfig]


def load_config(file: Path, environment: Mapping[str, str]) -> LoadedConfig:
    """Read, merge and check the configuration.

    Raises:
        ConfigError: a file is missing or not TOML, a key is unknown (the nearest one is named), a value is of
            the wrong type or out of range, or two values contradict each other.
    """
    loaded = load(HostConfig, file, environment)
    _check_sense(loaded.config, loaded.settings)
    return loaded


def _check_sense(config: HostConfig, settings: Settings) -> None:
    """What no single key can tell."""
    check_pair(config, "link.tls_cert", "link.tls_key")
    check_pair(config, "http.tls_cert", "http.tls_key")
    _check_cohorts(config, settings)
    check_pair(config, "repository.folder", "repository.keys")
    if not config.regeneration.recipe:
        return
    if not Path(config.regeneration.recipe).is_file():
        raise ConfigError(
            f"regeneration.recipe in {settings.origin('regeneration', 'recipe')}: "
            f"{config.regeneration.recipe} is no file"
        )
    if not config.repository.folder:
        raise ConfigError("regeneration.recipe needs repository.folder: what it builds is published there")
    if config.regeneration.cohort not in config.fleet.cohorts:
        known = ", ".join(config.fleet.cohorts) or "none"
        raise ConfigError(f"regeneration.cohort '{config.regeneration.cohort}' is no cohort; known: {known}")


def _check_cohorts(config: HostConfig, settings: Settings) -> None:
    members = [device for cohort in config.fleet.cohorts.values() for device in cohort]
    twice = sorted({device for device in members if members.count(device) > 1})
    if twice:
        raise ConfigError(f"{settings.file} puts {', '.join(twice)} into a cohort twice or into two cohorts")
