import sys

from pipeline.gpu_check.check_gpu import main

sys.exit(main())
