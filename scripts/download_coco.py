#!/usr/bin/env python
"""Download COCO 2017: train, val and their annotations, 20.4 GB; unpacked as much again while it works.

    python scripts/download_coco.py                     into data/coco
    python scripts/download_coco.py --root /data/coco   elsewhere

A download that was stopped goes on where it was. Archives are checked, unpacked and removed. See
https://cocodataset.org/#termsofuse for what one may do with the images.
"""

import sys
from pathlib import Path

from onestage.download.download import RemoteFile
from onestage.download.installation import ANNOTATION_SHARE, Part, run_installation

# The first is the same bucket over TLS; the certificate of the second does not match its name, so it is http.
SERVERS = ("https://s3.amazonaws.com/images.cocodataset.org", "http://images.cocodataset.org")


def _archive(path: str, md5: str, about_bytes: int) -> RemoteFile:
    urls = tuple(f"{server}/{path}" for server in SERVERS)
    return RemoteFile(Path(path).name, urls, md5, about_bytes)


# The checksums are those that tools which use these files agree on; COCO itself publishes none.
PARTS = (
    Part(
        "annotations",
        (_archive("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 253_000_000),),
        "annotations",
        ANNOTATION_SHARE,
    ),
    Part("val2017", (_archive("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 816_000_000),), "val2017"),
    Part(
        "train2017", (_archive("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_340_000_000),), "train2017"
    ),
)


def _next_steps(root: Path) -> str:
    annotations = root / "annotations"
    return (
        f"\nCOCO 2017 is in {root}. Next:\n\n"
        f"  onestage doctor {annotations / 'instances_train2017.json'} {annotations / 'instances_val2017.json'}\n"
        f"  onestage fit --config configs/coco_ssd300.yaml --data.root {root}"
    )


if __name__ == "__main__":
    sys.exit(run_installation(__doc__ or "", PARTS, "data/coco", _next_steps))
