"""The report of a store: one page without outside files, and the figures are those of the store."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from bag_support import FakeBag
from test_store import make_episode

from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.data.bag_import import import_bags
from diwa_core.data.info import write_report
from diwa_core.data.store import FAILURE, SUCCESS, PlayStore
from diwa_core.sim.skills import SKILLS


class Texts(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.texts, self.cells, self.sources = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_report_has_the_figures_of_the_store(tmp_path, capsys):
    store = PlayStore.create(tmp_path / "play", Contract(), {"seed": 4})
    for number, mark in enumerate((SUCCESS, FAILURE, -1)):
        episode = make_episode(30 * (number + 1), seed=number)
        episode["skill"] = np.full(len(episode["skill"]), number, np.int8)
        episode["actions"] = np.clip(episode["actions"], -1, 1)
        store.append_episode(episode, mark)
    assert main(["data", "info", str(store.path), "--out", str(tmp_path / "info.html")]) == 0
    assert "180 frames (0.1 min at 30 Hz) in 3 episodes, 1 success, 1 failure" in capsys.readouterr().out
    page = (tmp_path / "info.html").read_text()
    found = Texts(page)
    assert page.count("data:image/png;base64,") == 3 and all(source.startswith("data:") for source in found.sources)
    assert "shortest 1.0 s, median 2.0 s, longest 3.0 s" in found.texts and "<script" not in page
    row = found.texts[found.texts.index(SKILLS[0]) :][:5]
    assert row == [SKILLS[0], "30", "1", "1", "0"]
    mean = float(re.search(r"mean ([+-][\d.]+)", page)[1])
    assert mean == pytest.approx(store.load(("actions",))["actions"][:, 0].mean(), abs=1e-3)
    assert store.content_hash in page


def test_report_says_what_an_import_left_out(tmp_path):
    bag = FakeBag(100, moves=lambda n: n < 20, marks={99: ("success", "open_drawer")}, skip={"camera/static/image_raw": {10}})
    import_bags([bag.write(tmp_path / "morning")], tmp_path / "store")
    write_report(PlayStore.open(tmp_path / "store"), tmp_path / "info.html")
    texts = Texts((tmp_path / "info.html").read_text()).texts
    row = texts[texts.index("morning") :][:10]
    assert row[:2] == ["morning", "3.3 s"] and row[3] == "99" and row[6] == "1" and row[8] == "2", row
    assert float(row[5].rstrip(" %")) > 60


def test_empty_store_has_a_report(tmp_path):
    write_report(PlayStore.create(tmp_path / "play", Contract()), tmp_path / "deep" / "info.html")
    assert "0 frames" in (tmp_path / "deep" / "info.html").read_text()
