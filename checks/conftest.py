"""Brings in the fixtures of checks/fixtures.py.

They are a plugin, not written down here, since pytest shows what a conftest.py has to its own
folder only, and tests.py uses them too: it names the same plugin in pytest_plugins. Whichever comes
first loads it, the other finds it there, and a fixture of the session is made once for both. So
`python tests.py`, `pytest tests.py` and `pytest checks` see the same."""
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("checks.fixtures")
