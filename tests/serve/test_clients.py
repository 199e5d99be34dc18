"""The clients people use, as they are installed, against a real server: `make test-clients`.

Each program in `clients/` is one client used by its defaults; it ends with an error if something is not as it expects.
They live in an environment of their own (`LOWRANK_CLIENTS`, else `.venv-clients`), since they want other packages than
we do.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank.pipelines.inference import open_inference_model
from lowrank.serve.engines.torch import BankEngine
from tests.serve.running import TOKEN, http_serving

pytestmark = pytest.mark.clients
_HERE = Path(__file__).parent / "clients"
_ENVIRONMENT = Path(os.environ.get("LOWRANK_CLIENTS", Path(__file__).parents[2] / ".venv-clients")).absolute()
PROGRAMS = sorted(path.name for path in _HERE.iterdir() if path.suffix in (".py", ".mjs"))
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base that ships with lowrank, told of tools."""
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE, "utf-8")
    trained = open_inference_model("lowrank/tiny", chat_template=str(template), notify=lambda text: None)
    with http_serving(BankEngine(trained.base, trained.bank, trained.renderer, trained.slots)) as address:
        yield address


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_finds_what_it_knows(url: str, program: str, tmp_path: Path) -> None:
    if program.endswith(".py"):
        arguments = [str(_ENVIRONMENT / "bin" / "python"), str(_HERE / program)]
    else:  # node looks for packages beside the program
        (tmp_path / "node_modules").symlink_to(_ENVIRONMENT / "node" / "node_modules")
        (tmp_path / program).write_text((_HERE / program).read_text("utf-8"), "utf-8")
        arguments = ["node", str(tmp_path / program)]
    if not _ENVIRONMENT.is_dir():
        pytest.fail(f"{_ENVIRONMENT} is not there: make test-clients makes it")
    ended = subprocess.run([*arguments, url, TOKEN], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
