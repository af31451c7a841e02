import sys

from mmicl_kernels.cli import main

sys.exit(main())
