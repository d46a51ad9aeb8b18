import sys

from pipeline.search.command import main

sys.exit(main())
