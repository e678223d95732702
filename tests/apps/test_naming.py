from __future__ import annotations

import json

from ecliptic.apps.naming import usual_templates
from ecliptic.core.encoder import load
from tests.towers import clip_encoder


def test_bare_names_for_the_sentence_encoder_only():
    encoder = clip_encoder()
    assert usual_templates(encoder) == "photo"
    encoder.name = "offline"
    assert usual_templates(encoder) == "plain"


def test_classify_uses_them_unless_told(cli, model, tmp_path):
    from ecliptic.data.scenes import scenes

    path = tmp_path / "one.png"
    scenes("test", n=1, seed=0, size=32)[0]["image"].save(path)

    def shares(*more):
        return json.loads(cli("classify", path, "--labels", "a b, c", "--model", model, "--json", *more).stdout)

    assert shares() == shares("--template", "photo")
    assert shares() != shares("--template", "plain")
    assert load(model).name != "offline"
