import sys, types, time
import torch
for name, path in (("twofold","src/twofold"),("twofold.attention.backends","src/twofold/attention/backends")):
    m=types.ModuleType(name); m.__path__=[path]; sys.modules[name]=m
sys.path.insert(0,"src")
import numpy as np
from twofold.attention import mla
from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.backends.paged_decode import PagedDecode
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import LatentSpec
print(torch.__version__, torch.cuda.get_device_name())
D="cuda"
class Both(SDPABackend):
    def __init__(self): self.d=PagedDecode()
    def attend_absorbed(self,q,pages,spec,md):
        r=slice(len(q)); return self.d(q,pages,spec.absorbed,md.block_tables[r],md.seq_lens[r])
def meta(starts,lengths,tables,nd):
    qs=np.concatenate([[0],np.cumsum(lengths)]); sl=np.array(starts)+np.array(lengths)
    t=np.zeros((len(tables),max(map(len,tables))),np.int32)
    for i,b in enumerate(tables): t[i,:len(b)]=b
    f=lambda a: torch.from_numpy(np.ascontiguousarray(a,dtype=np.int32)).to(D)
    return AttentionMetadata(num_tokens=int(qs[-1]),query_start_np=qs,seq_lens_np=sl,block_tables_np=t,query_start=f(qs),seq_lens=f(sl),block_tables=f(t),max_query_len=max(lengths),max_seq_len=int(sl.max()),num_decode_rows=nd)
def plain(q,pages,spec,md):
    w=spec.weight.double().view(spec.num_heads,-1,spec.kv_lora_rank); nope=spec.qk_head_dim-spec.qk_rope_head_dim
    out=[]
    for r,sl in enumerate(md.seq_lens_np):
        slots=pages[torch.from_numpy(md.block_tables_np[r]).long().to(D)].flatten(0,1).double()[:sl]
        kv=torch.einsum('nl,hdl->nhd',slots[:,:spec.kv_lora_rank],w)
        k=torch.cat([kv[...,:nope],slots[:,None,spec.kv_lora_rank:].expand(-1,spec.num_heads,-1)],-1); v=kv[...,nope:]
        b,e=md.query_start_np[r:r+2]; Q=q[b:e].double()
        s=torch.einsum('qhd,nhd->hqn',Q,k)*spec.scaling
        pos=torch.arange(sl-(e-b),sl,device=D)[:,None]>=torch.arange(sl,device=D)
        out.append(torch.einsum('hqn,nhd->qhd',s.masked_fill(~pos,-torch.inf).softmax(-1),v))
    return torch.cat(out)
torch.manual_seed(0)
for dt in (torch.float32,torch.bfloat16):
    for H in (16,):
        w=torch.randn(H*256,512,device=D,dtype=dt)/512**.5
        spec=LatentSpec(H,H,192,128,192**-.5,kv_lora_rank=512,qk_rope_head_dim=64,weight=w)
        pages=torch.randn(40,128,576,device=D,dtype=dt)
        md=meta([1000,77,0,300,900],[1,1,200,130,333],[list(range(9,18)),[3],[20,7],[20,7,30,31],[20,7,30,31,2,1,39,38,37,36]],2)
        q=torch.randn(md.num_tokens,H,192,device=D,dtype=dt)
        ref=plain(q,pages,spec,md)
        for b in (SDPABackend(),)+((Both(),) if dt!=torch.float32 else ()):
            for step in (10**6,250):
                mla.piece_tokens=lambda s,i,step=step: step
                o=mla.attend(q,pages,spec,md,b)
                print(dt,type(b).__name__,step,'max err',(o.double()-ref).abs().max().item(), 'ref max',ref.abs().max().item())
# decode: kernels and time of absorb, release
from torch.profiler import profile, ProfilerActivity
dt=torch.bfloat16
b=Both()
for B in (1,32):
    n=1024
    pages=torch.randn(B*8+1,128,576,device=D,dtype=dt)
    md=meta([n-1]*B,[1]*B,[list(range(1+8*i,9+8*i)) for i in range(B)],B)
    q=torch.randn(B,16,192,device=D,dtype=dt)
    for _ in range(3): mla.attend(q,pages,spec,md,b)
    g=torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(g):
        for _ in range(10): mla.attend(q,pages,spec,md,b)
    for _ in range(3): g.replay()
    torch.cuda.synchronize(); t=time.perf_counter()
    for _ in range(20): g.replay()
    torch.cuda.synchronize(); print('decode',B,(time.perf_counter()-t)/200*1e6,'us per layer in graph')
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        mla.attend(q,pages,spec,md,b); torch.cuda.synchronize()
    print(p.key_averages().table(sort_by='cuda_time_total',row_limit=12,max_name_column_width=70))
# prefill pieces
for n in (32768,):
    rows=torch.randn(n,576,device=D,dtype=dt)
    for _ in range(3): mla.expand(rows,spec)
    torch.cuda.synchronize(); t=time.perf_counter()
    for _ in range(10): mla.expand(rows,spec)
    torch.cuda.synchronize(); print('expand',n,(time.perf_counter()-t)/10*1e3,'ms')
    o=torch.randn(16384,16,128,device=D); l=torch.randn(16384,16,device=D); p2=o.to(dt)
    for _ in range(3): mla.merge(o,l,p2,l)
    torch.cuda.synchronize(); t=time.perf_counter()
    for _ in range(10): mla.merge(o,l,p2,l)
    torch.cuda.synchronize(); print('merge 16k rows',(time.perf_counter()-t)/10*1e3,'ms')
