"""What a chaos run reads in the logs of its schedulers."""

from __future__ import annotations

import time
from datetime import datetime

from deploy.chaos_report import ChaosReport

_LOG = """\
2026-11-25 08:00:00,100 I scheduler-1 octavo.hub: worker worker-1 left; 3 requests
2026-11-25 08:00:00,120 I scheduler-1 octavo.hub: 2 requests that had lost their worker are planned again, the first after 20.0 ms
2026-11-25 08:00:00,140 I scheduler-1 octavo.hub: 1 requests that had lost their worker are planned again, the first after 40.0 ms
2026-11-25 08:00:05,300 I scheduler-1 octavo.hub: worker worker-2 left; 1 requests
2026-11-25 08:00:05,301 I scheduler-1 octavo.hub: 1 requests that had lost their worker are planned again, the first after 1.5 ms
"""


def test_detection_is_from_the_fault_and_the_first_plan_counts_once_a_loss() -> None:
    report = ChaosReport()
    at = time.mktime(datetime(2026, 11, 25, 8, 0, 0).timetuple())
    faults = [("kill worker", "worker-1", at + 0.090), ("stop worker", "worker-2", at + 5.05)]
    report.read_schedulers([_LOG, ""], faults, within=1.0)
    shown = report.as_json()
    assert shown["detection_ms"]["kill worker"]["max"] == 10.0
    assert shown["detection_ms"]["stop worker"]["max"] == 250.0
    assert report.first_plan == [20.0, 1.5]
