"""How channels are chosen: one file a criterion; importing this fills the table of all of them."""

from thinet.criteria import apoz as apoz
from thinet.criteria import block_obs as block_obs
from thinet.criteria import bn_scale as bn_scale
from thinet.criteria import fpgm as fpgm
from thinet.criteria import group_brain_damage as group_brain_damage
from thinet.criteria import l2 as l2
from thinet.criteria import random as random
from thinet.criteria import taylor as taylor
from thinet.criteria import taylor_fo as taylor_fo
from thinet.criteria import thinet as thinet
from thinet.criteria import thinet_omp as thinet_omp
from thinet.criteria import weight_sum as weight_sum
from thinet.criteria.base import Consumer as Consumer
from thinet.criteria.base import Criterion as Criterion
from thinet.criteria.base import GroupStatistics as GroupStatistics
from thinet.criteria.base import Need as Need
from thinet.criteria.base import Order as Order
from thinet.criteria.base import criteria as criteria
from thinet.criteria.base import criterion as criterion
from thinet.criteria.base import get as get
