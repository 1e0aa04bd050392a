"""What others import, call and have saved: it stays where it is when files move."""

from __future__ import annotations

import base64
import importlib
import pickle
import sys
import tomllib
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from drope_kernels import LogScale, Rope
from drope_kernels.nn import DecoderConfig, DecoderLM

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())

NAMES = {
    "drope_kernels": "LogScale Rope attention attention_decode attention_varlen "
    "available_backends build_info explain merge_attention",
    "drope_kernels.nn": "DecoderBlock DecoderConfig DecoderLM DecoderOutput DecoderStack "
    "DropeAttention GatedMLP",
    "drope_kernels.hf": "EXPORT_SUPPORT DropState drop_positions export load_model load_tokenizer "
    "position_free_parameters restore_positions set_temperature use_kernels verify_export",
    "drope_kernels.recalibrate": "Document Documents LengthSweep PackedFolder PackedRows "
    "RecalibrationConfig RecalibrationResult TokenRows pack_documents packed_rows read_documents "
    "recalibrate",
    "drope_kernels.evaluate": "ROPE_METHODS WRITTEN_TASKS CaseScores DecodingModel LanguageModel "
    "MeanLoss NeedleCases NeedleTask PositionBucket Proportion SplitModel SweepData SweepRow "
    "WrittenCases draw_sweep fit_log_slope fit_temperature last_target_losses log_spaced_edges "
    "loss_by_position mean_loss rope_at_length row_named run_sweep score_needles text_windows "
    "window_losses write_cases",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_of_packages(module: str) -> None:
    if module not in ("drope_kernels", "drope_kernels.nn"):
        pytest.importorskip("transformers")
    package = importlib.import_module(module)
    assert set(package.__all__) == set(NAMES[module].split())
    for name in package.__all__:
        getattr(package, name)


def test_names_of_modules() -> None:
    assert importlib.import_module("drope_kernels.rope").Rope is Rope
    assert importlib.import_module("drope_kernels.scale").LogScale is LogScale


def test_names_of_ops() -> None:
    for name, results in (("fwd", 5), ("bwd", 5), ("decode", 2)):
        op = getattr(torch.ops.drope, f"attention_{name}").default
        assert len(op._schema.returns) == results


def test_the_script() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"drope": "drope_kernels.cli:main"}
    assert callable(importlib.import_module("drope_kernels.cli").main)


# ---- pickles -----------------------------------------------------------------------------------
# Made at commit 6e1b1cd, before nn, its config and the readers of texts moved.
OLD_PICKLES = {
    "rope": (
        "c-mEtF-`+P3`IeNuqaJLM@I<-X(_W^ibxbtQH^GIykW$wC(L*P4Fb9#xx+}@ha12d=n*GiH(8KyWBJSf|M$>)I"
        "o{k@4ey!Y=b)}2Ah<Yc58>WfyPoCfQSRiBx9Ji{%OrnWu1#CU)-ug_V38m=&<il~#5=Ln&f-jX|9@%~;5q@87N"
        "YRrLI*tWKL0xUl`hGLrexTW9r$2p7PV8gzEyJ{Em@BW>H>^uyiuk(?-mW2s&u5rnRm{$7@fb7$@r@iGYSbyO(4"
        "ruaAt9#S}Zx`p(X-ch5tf~zfV5yKi^-uuP6nK4Pq)rKYUPg#{"
    ),
    "log_scale": (
        "c-m`Vnd;2|0X@PgMfnA(@!6?Gd8s+Ydd10!IjK{6IDGQcgTc(nQ#2c=)K1apVN9OlZhtGz)V}8J#2%iKqQuO+_"
        "?*<d^pcDzz6>m-NqPYE<sUo"
    ),
    "config": (
        "c-mD@u};G<6r{9}(gFfzJ^+?}0w96Z0f~W)$$E)j8Y_w2+Aoocgajj!nJ_z_z``%|Z;;qnv6H9>FTOkb-Q9Z}y"
        "sdg0&9TQ^t2we9wZy_qI3|jtW{Hxim^r(5)e4s_e|4u%?!ledQLPe)nGyHsuKRYJ3C>Y=eA6BZNvKQY0th>`XG"
        "gLsSpiGbCeWQgGX&nS-N5p?6K?D<0LDe>@gQ_`_UM1tRvg@hYh7%MG9+-*i@R>Yerqvq8WjjNa`$W_lRzQlECd"
        "NzvsB~4;{zZ<NkU1MLPAQr>G^kOw9Tl}()g4rw$UPIQt9A4G9`lct(L|c?_(Jw=ia(~_X-JQYqk0Fml6vI%CIc"
        "vYaHen&W)R%eXM@oKfhi=M?uUG_jyqaNsf~H)uAHg+f04|s}Hr{"
    ),
    "model": (
        "c-q}rOKclO81^fU<2a8trIfUk3ff{S6dc!f5~@11O;aQ%CbSnHT1IQ{*t_<6*SkBLG=-p4(2!JvdSIakD%1lA4"
        "hXnZpr)!Xr63R&xWN?(fmEqCRH;b(vuiufgW^lm#Fo4>^Ups!v-|z;o%Osw^rXZ3(QaN-N*EQeCSytOlVy{(jo"
        "^&JV{L5Qe9wIDyg6eAsgG!!D2sB=oTu%m#A#d+6RhblNqs17WV4mQP9!TbD#1w936@E94(XVfmrUA&(p;u6#c4"
        "b$X&4ELQqWD>o>3$TXNaiCZ1jo-+hcx2%n){jlP2w2T4pa1x)^yo5_Oa{Bx(7ynWUX4t7xnEdzVwult=``*5#@"
        "kyH;>;(iAtXqYMY<<10K{YdlMjV9)GcJ+sChTaZpTf)NkTw`}=i^%E=a-HRlJ;~&Jab2W#eFW<q3iVAN?ShrAZ"
        "fdQ6G!9fER%uf+`k2TnZmU+QDV+ua_`!AV7z`BXB#cq0%!Zy3N-EMZ+O|RYTvYXv@v&U|pwwt|nv!5LzfQxC&B"
        "cc>A1OIWNXc++nv9EH{J{`nO#~_!-86(exaK!<scM6L+ftWO4uSNzDC7mIq;j|%2{F2DRT4AJa0)$joG&C88i6"
        "HH;*Xz)5IoPw?ex+GWDWdc=f%o>Fd9=sraLl?c`lb6<M(^#(e>U+%->hr=Pd8j=R7Wt?4T@FL6rzAsqe-R;imW"
        "<;A=Lphl1PYz5tez8lU3Jz$`3>`4N9ns=diB2XH-ux)dECaP&A^pBwQ&sj6|8J-h?ORVfRqvoZ6c37zXSaOtms"
        "*`^c&zV?Ba@6b?>K*+jqUOmza!P-Gx_FccjK55xusL#ln>OvzB)32&09o>$>+XH>^pyiTsqYnu$mcRS|dzy0#o"
        "@Rv^=7(R3?F#O3Ke_a2TA2u(TC(VQ-;ZC^b%!Di9oHG|JoC(n9t=>D((;ucd(N5VYB3u;|-AuS?M{Nj7QG}Dx_"
        "7Z20MgA<<3SW^s3ua3zLcfi*h{0i=c&YNhbgK^fk5NtoQAkgNG+@<Spx%mLE*NR*mAGkU0cr0l@y#eQ0ow_ZNB"
        "!d#Z46A~dg>T;hU#_vsHCj7j<@Mp$|8;snH{8ag!!B!g!u<hjrBc>R|UJN<kvDZ5}?EZOx`iOv*KJq;g~Qgyc`"
        "q~N82~K1&9s}#D-$aEr91gEI^ePEP$t?5dT~j%X*}%eEWCxMxe`8u4=yP!J1D!X_3>-r14ONy<L=17IVbVz*>W"
        "{2NZ+U6PUIZY#9(fZ(e|-k^V@eL4a-EI)D$~T8zJaxmdpIX^(F^e=FV~z{29g#a8$s;SzqdA)IV_2qS}${-JPV"
        "5LS5WAbkGk@5`s>4#heAVmY3;c5?$ls5Co-vCzRGu$>J-SmmvQ@Qu62<5&Clmw(;+*A4ljiH)a)282rxZV8y<!"
        "LmAOfQ<^1O9UV5Rimy}wNQ<+T3NaVz<^8O45FB{wSe>@^SMdtVZi}}S1nf11%!YdeMwl(5dpkMn!1Zpi3JkA6O"
        "iff<6{%+9L?ldg7rVL>)zb58|e=Z9voQVL0oIgZjBdY*Hw|-D<6Ncc=_VKT4><h5Hjlo;b}EWO^#hO8jAuV;YP"
        "5l@z!DI=saFdwjH^-@vv*-l_|N&(d&;zqS0`yA<e7t)}ePK*cSiegWYuwA8-Q<A02wminjm&yF|GJ;kcD8TfTt"
        "qUX_M1Iwy(eI4e1%ttZD%B^m2V8{ahQ8tWelg(IPc)V0c6uda^SVfL>9egWXV@Ca%z-Bsi;k92_pFV4<F-MFNi"
        "C*oh-{`=~+JMYr1Si(if{HH`6BQBeTT-%%n(b!=XE4gY_piV~e9|FKliaqFWC=?lN2>UAU2E;!94dB3b&tHd54"
        "eb0PjOH!X*8yTr)595!g~1?)8uYw2?<Rzk`t72<9nQ0$O0v^{2e{>)O`pv54-Uiz8>*UDdF!g?uN}HR{Q3(&-H"
        "3b|J$(9We|h5m=<xWP_ZqF5uTzlaX5e}=ikua5Cf&9C;~;O>k5P5Hqf$^lW{+zh3;mNyhD%$(u=;zuAo4txD`O"
        "Yk0+?W}hyh80D^w@-v)r*#MNc^M&oBXW=J!IA%<r?V2jF_fT;THi*^v6Jgb@xmtwXlhxm4u0gc2x3#PweSfU@L"
        "VtU}}h^+6(8>syuo<-W=%$|6BJ;mu_JS=congbTc)bl<<R*HU-"
    ),
    "document": (
        "c-m`VnHtLg0X@noMfnA(@!6?Gd8s+YdPS+pi8+}`MTsS;dMWwIrManjCB;*EI9#CYDU+vYHcqLXqS3=rl3GzRC"
        "4;qxtvJ85C^>aX4@+8R4v5Oh%uAi(SDK^;0C(ml$N"
    ),
}


def unpickled(name: str) -> Any:
    return pickle.loads(zlib.decompress(base64.b85decode(OLD_PICKLES[name])))


def test_old_values_load() -> None:
    assert unpickled("rope") == Rope.yarn(4.0, original_max_position_embeddings=64, dim=8)
    assert unpickled("log_scale") == LogScale(0.412, 1024)


def test_old_models_load() -> None:
    old = unpickled("model")
    assert type(old) is DecoderLM
    assert type(old.config) is DecoderConfig
    new = DecoderLM(old.config)
    new.load_state_dict(old.state_dict())
    ids = torch.tensor([[0, 2, 1, 2]])
    assert torch.equal(old(ids).logits, new(ids).logits)


def test_old_configs_load_where_nn_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unpickled("config").rope == Rope(theta=100.0)
    monkeypatch.delitem(sys.modules, "drope_kernels.decoder_config")  # what importing nn brings
    with pytest.raises(ModuleNotFoundError, match=r"drope_kernels\.decoder_config"):
        unpickled("config")


def test_old_documents_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ModuleNotFoundError, match=r"drope_kernels\.recalibrate\.documents"):
        unpickled("document")
