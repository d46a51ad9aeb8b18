import sys

from pipeline.verify.command import main

sys.exit(main())
