"""``mmtrain submit`` in a checkout: ``python launch/submit.py --config vim2_base_in1k --nodes 4``."""

from __future__ import annotations

import sys

from mmtrain.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "submit")
    main()
