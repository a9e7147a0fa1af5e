#!/usr/bin/env python
"""Download PASCAL VOC: 2007 trainval and test, and 2012 trainval, 2.9 GB; unpacked as much again while it works.

    python scripts/download_voc.py                      into data/voc
    python scripts/download_voc.py --root /data/voc     elsewhere

A download that was stopped goes on where it was. Archives are checked, unpacked and removed. The images are of flickr:
see https://thor.robots.ox.ac.uk/pascal/VOC/ for what one may do with them.
"""

import sys
from pathlib import Path

from onestage.download.download import RemoteFile
from onestage.download.installation import Part, run_installation

# The second is the older name of the same server, which redirects.
SERVERS = ("https://thor.robots.ox.ac.uk/pascal/VOC", "http://host.robots.ox.ac.uk/pascal/VOC")


def _archive(path: str, md5: str, about_bytes: int) -> RemoteFile:
    urls = tuple(f"{server}/{path}" for server in SERVERS)
    return RemoteFile(Path(path).name, urls, md5, about_bytes)


# Checksums as in torchvision.datasets.voc (0.29).
PARTS = (
    Part(
        "VOC2007",
        (
            _archive("voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64", 460_000_000),
            _archive("voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", 451_000_000),
        ),
        "VOCdevkit/VOC2007",
    ),
    Part(
        "VOC2012",
        (_archive("voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd", 2_000_000_000),),
        "VOCdevkit/VOC2012",
    ),
)


def _next_steps(root: Path) -> str:
    return (
        f"\nPASCAL VOC is in {root}. Next:\n\n  onestage doctor {root}\n"
        f"  onestage fit --config configs/voc_ssd300.yaml --data.root {root}"
    )


if __name__ == "__main__":
    sys.exit(run_installation(__doc__ or "", PARTS, "data/voc", _next_steps))
