"""What every test may use: where the larger real datasets are, and a quiet, deterministic torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank.third_party import code_allowed

pytest_plugins = ["tests.torchvision_without_cuda", "tests.processor_time", "tests.plans", "tests.plots"]
"""In this order: the first must be imported before transformers, so nothing here imports that."""
gc.set_threshold(50_000, 20, 100)  # as in lowrank/cli/main.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared-data", default=None, help="folder with LLaMA-Factory's demo datasets (alpaca_zh_demo.json, ...)"
    )
    parser.addoption("--update-golden", action="store_true", help="write tests/golden.json anew (tests/test_golden.py)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The one test that takes minutes begins first, so that nobody waits for it at the end."""
    items.sort(key=lambda item: "test_demo.py" not in item.nodeid)


def pytest_collection_finish() -> None:
    """A million objects of libraries and of tests are there by now, and stay: nobody need look through them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries say what they leave behind at the end of a process, and it is to be nothing of ours."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real datasets; tests that need it are skipped without it."""
    folder = request.config.getoption("--shared-data")
    if not folder:
        pytest.skip("needs --shared-data DIR (LLaMA-Factory's data folder)")
    return Path(folder).resolve()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def allowed_code() -> Iterator[None]:
    """As under `--allow-code`."""
    with code_allowed():
        yield
