import sys

from pipeline.tune.tuner import main

sys.exit(main())
