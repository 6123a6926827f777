"""Captions are valid reStructuredText with and without the params they use, and every figure and page of the report has one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

jinja2 = pytest.importorskip("jinja2")
core = pytest.importorskip("docutils.core")

RULES = Path(__file__).resolve().parents[3] / "rules"
CAPTIONS = sorted((RULES / "report").glob("*.rst"))
CONFIG = {"inference": {"level": 0.95, "error_model": "t", "calls": "direction", "q": 0.1}, "benchmark": {"bootstrap": 1000}}


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda p: p.stem)
@pytest.mark.parametrize("params", [{}, {"method": "stacked", "config": CONFIG}], ids=["bare", "full"])
def test_a_caption_renders(caption, params):
    snakemake = SimpleNamespace(wildcards=SimpleNamespace(dataset="demo", fold="0", seed="1"), params=params, config={})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(caption.read_text()).render(snakemake=snakemake)
    html = core.publish_parts(text, writer="html", settings_overrides={"halt_level": 2, "report_level": 2})["body"]
    assert "system-message" not in html
    words = re.sub("<[^>]+>", " ", html)
    assert "{" not in words
    assert len(words.split()) > 40


def test_every_caption_that_a_rule_names_is_there():
    named = {name for path in RULES.glob("*.smk") for name in re.findall(r'caption="report/([^"]+)"', path.read_text())}
    assert named <= {path.name for path in CAPTIONS}
