"""A report opens in a browser from the disk: no request to anywhere, no error, and its tables sort."""

from __future__ import annotations

from simmerge_ray.reports.figures import new_figure, save_figure
from simmerge_ray.reports.page import table_block, write_page


def test_a_report_opens_from_the_disk_without_a_request_and_its_tables_sort(browser, tmp_path):
    figure, ((axis,),) = new_figure(2, 1)
    axis.plot([0, 1])
    save_figure(figure, tmp_path, "a.png")
    rows = [["b", 0.5, "+0.1 [0, 1]"], ["a", 0.25, "-"], ["c", 0.75, "-0.2 [-1, 0]"]]
    table = table_block(["name", "utility", "gain"], rows)
    path = write_page(tmp_path, ["# A report", "![It rises](a.png)", table])
    asked, troubles = [], []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(path.with_suffix(".html").as_uri())
        assert page.evaluate("document.images[0].naturalWidth") > 0

        def names(shown=page) -> list[str]:
            return shown.eval_on_selector_all("tbody td:first-child", "cells => cells.map((one) => one.textContent)")

        page.click("th button >> nth=1")
        assert names() == ["c", "b", "a"]  # numbers: the largest first
        page.click("th button >> nth=1")
        assert names() == ["a", "b", "c"]
        page.click("th button >> nth=2")
        assert names() == ["b", "c", "a"]  # by the value before an interval; what has none comes last
        page.click("th button >> nth=0")
        assert names() == ["a", "b", "c"] and page.get_attribute("th >> nth=0", "aria-sort") == "ascending"
        page.close()
    assert not troubles and all(url.startswith(("file:", "data:")) for url in asked)
