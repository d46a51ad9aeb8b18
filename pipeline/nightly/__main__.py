import sys

from pipeline.nightly.night import main

sys.exit(main())
