import os
import sys

os.environ['HF_HUB_OFFLINE'] = '1'  # no test may ask the network
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))
