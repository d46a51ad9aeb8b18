import sys

from pipeline.report.page import main

sys.exit(main())
