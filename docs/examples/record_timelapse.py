"""Record a time-lapse of z-stacks from your own pycromanager script.

With Micro-Manager open and its server running (Tools > Options > Run server on port 4827):

    python record_timelapse.py RUN

Without Micro-Manager's window, with the devices of a configuration file:

    python record_timelapse.py RUN --micromanager FOLDER --config FILE

RUN is the folder to make: raw planes and, beside them, their refocused twins, as OME-Zarr.
"""

import argparse
from pathlib import Path

from pycromanager import Acquisition, multi_d_acquisition_events, start_headless, stop_headless

from acquire.recorder import Recorder
from refocus import settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--micromanager", type=Path, help="folder of Micro-Manager's devices")
    parser.add_argument("--config", type=Path, help="Micro-Manager's configuration file")
    options = parser.parse_args()

    if options.micromanager:
        start_headless(str(options.micromanager), str(options.config), python_backend=True)
    events = multi_d_acquisition_events(
        num_time_points=3,
        time_interval_s=1.0,
        channel_group="Channel",
        channels=["DAPI", "FITC"],
        channel_exposures_ms=[20, 40],
        z_start=-2.5,
        z_end=2.5,
        z_step=1.25,
    )
    with (
        Recorder(settings.load(), out=options.run, events=events) as recorder,
        Acquisition(**recorder.hooks()) as acquisition,
    ):
        acquisition.acquire(events)
    if options.micromanager:
        stop_headless()

    status = recorder.status()
    print(
        f"{status.counts.saved} raw and {status.counts.refocused} refocused planes in {status.run}"
    )


if __name__ == "__main__":
    main()
