"""What makes a virtual device look like a Jetson to programs: a board's files, and stand-ins for its tools.

One board: an Orin Nano 8GB developer kit in its "super" flavour, L4T 36.4.4. Release line, package versions, device
tree and the form of every answer were captured from devices; nvpmodel.conf is synthetic, in NVIDIA's grammar, and so is
everything that a real board would measure: temperatures and rails never change. The tools keep state as a board does (a
mode survives a reboot, locked clocks do not), and change nothing else.
"""

from __future__ import annotations

from pathlib import Path

L4T_PACKAGES = {"nvidia-l4t-core": "36.4.4-20250616085344", "nvidia-jetpack": "6.2.1+b38"}
MODEL = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
DEVICE_TREE = {
    "model": f"{MODEL}\0",
    "compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
}
ZONES_MILLI_C = {"cpu-thermal": 49468, "gpu-thermal": 50125, "soc0-thermal": 48906, "tj-thermal": 50531}

RELEASE = """\
# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16 16:07:13 UTC 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""

MODES = (  # number, name, cores, TPC mask, highest CPU kHz, GPU Hz, EMC Hz
    (0, "15W", 6, 240, 1497600, 612000000, 2133000000),
    (1, "25W", 6, 240, 1344000, 918000000, 3199000000),
    (2, "MAXN_SUPER", 6, 240, 1728000, 1020000000, 3199000000),
    (3, "7W", 4, 252, 960000, 408000000, 2133000000),
)
DEFAULT_MODE = 1

NVPMODEL = """\
#!/bin/sh
# nvpmodel of a virtual board: answers in the form of a device's, and keeps the mode.
CONF=/etc/nvpmodel.conf
STATE=/var/lib/nvpmodel/status

current() {
    if [ -r "$STATE" ]; then sed -n 's/^pmode:0*\\([0-9][0-9]*\\) .*/\\1/p' "$STATE"
    else sed -n 's/^< PM_CONFIG DEFAULT=\\([0-9]*\\) >$/\\1/p' "$CONF"; fi
}
name_of() { sed -n "s/^< POWER_MODEL ID=$1 NAME=\\([^ ]*\\) >\\$/\\1/p" "$CONF"; }
value_of() {  # of a mode: parameter and argument
    sed -n "/^< POWER_MODEL ID=$1 /,/^$/s/^$2 //p" "$CONF"
}
keep() { mkdir -p /var/lib/nvpmodel && printf 'pmode:%04d fmode:fan_mode_quiet\\n' "$1" > "$STATE"; }
query() {
    mode=$(current)
    if [ "$1" = verbose ]; then
        echo "NVPM VERB: Config file: $CONF"
        echo "NVPM VERB: parsing done for $CONF"
        printf 'NVPM VERB: Current mode: '
    fi
    echo "NV Power Mode: $(name_of "$mode")"
    echo "$mode"
    [ "$1" = verbose ] || return 0
    mask=$(value_of "$mode" "TPC_POWER_GATING TPC_PG_MASK")
    gpu=$(value_of "$mode" "GPU MAX_FREQ")
    path=/sys/devices/platform/gpu.0/tpc_pg_mask
    echo "NVPM VERB: PARAM TPC_POWER_GATING: ARG TPC_PG_MASK: PATH $path: REAL_VAL: $mask CONF_VAL: $mask"
    path=/sys/devices/platform/17000000.gpu/devfreq_dev/max_freq
    echo "NVPM VERB: PARAM GPU: ARG MAX_FREQ: PATH $path: REAL_VAL: $gpu CONF_VAL: $gpu"
}
set_mode() {
    [ -n "$(name_of "$1")" ] || { echo "NVPM ERROR: mode $1 is not in $CONF"; exit 255; }
    [ "$(id -u)" = 0 ] || { echo "NVPM ERROR: root is needed to set a mode"; exit 255; }
    gating="TPC_POWER_GATING TPC_PG_MASK"
    if [ "$(value_of "$1" "$gating")" = "$(value_of "$(current)" "$gating")" ]; then keep "$1"; exit 0; fi
    if [ -z "$2" ]; then
        echo "NVPM WARN: Golden image context is already created"
        echo "NVPM WARN: Reboot required for changing to this power mode: $1"
        echo "NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:"
        read -r answer || { echo "NVPM ERROR: bad input!"; exit 255; }
        case $answer in YES|yes) ;; *) echo "NVPM ERROR: optMask is 1, no request for power mode"; exit 255 ;; esac
    fi
    keep "$1"
    echo "NVPM WARN: rebooting"
    systemctl reboot
}

action= mode= force=
while [ $# -gt 0 ]; do
    case $1 in
        -q|--query) action=${action:-query} ;;
        --verbose) action=verbose ;;
        -m|--mode) action=set mode=$2; shift ;;
        --force) force=1 ;;
        *) echo "NVPM ERROR: option $1 is not known to this stand-in"; exit 255 ;;
    esac
    shift
done
case $action in query|verbose) query "$action" ;; set) set_mode "$mode" "$force" ;; *) exit 255 ;; esac
"""

JETSON_CLOCKS = f"""\
#!/bin/sh
# jetson_clocks of a virtual board: answers in the form of a device's; locked until the next boot.
STATE=/run/jetson_clocks.locked
CONF=/etc/nvpmodel.conf
[ "$(id -u)" = 0 ] || {{ echo "Error: Run this script(/usr/bin/jetson_clocks) as a root user"; exit 1; }}

show() {{
    mode=$(nvpmodel -q | tail -n 1)
    most() {{ sed -n "/^< POWER_MODEL ID=$mode /,/^$/s/^$1 //p" "$CONF"; }}
    cpu=$(most "CPU_A78_0 MAX_FREQ") cores=$(most "CPU_ONLINE CORES")
    gpu=$(most "GPU MAX_FREQ") emc=$(most "EMC MAX_FREQ")
    if [ -e "$STATE" ]; then least=$cpu least_gpu=$gpu now_emc=$emc idle=0 override=1
    else least=729600 least_gpu=306000000 now_emc=2133000000 idle=1 override=0; fi
    echo "SOC family:tegra234  Machine:{MODEL}"
    echo "Online CPUs: 0-$((cores - 1))"
    for core in $(seq 0 $((cores - 1))); do
        echo "cpu$core:  Online=1 Governor=schedutil MinFreq=$least MaxFreq=$cpu CurrentFreq=$least" \\
            "IdleStates: WFI=$idle c7=$idle "
    done
    echo "GPU MinFreq=$least_gpu MaxFreq=$gpu CurrentFreq=$least_gpu"
    echo "Active GPU TPCs: 4"
    echo "EMC MinFreq=204000000 MaxFreq=$emc CurrentFreq=$now_emc FreqOverride=$override"
    echo "FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=69"
    nvpmodel -q | head -n 1
}}

case $1 in
    --show) show ;;
    --store) show > "${{2:-$HOME/.jetsonclocks_conf.txt}}" ;;
    --restore) rm -f "$STATE" ;;
    "") : > "$STATE" ;;
    *) echo "Error: option $1 is not known to this stand-in"; exit 1 ;;
esac
"""

TEGRASTATS = """\
#!/bin/sh
# tegrastats of a virtual board: one captured line with the time of now, again and again.
interval=1000
while [ $# -gt 0 ]; do
    case $1 in --interval) interval=$2; shift ;; --logfile) exec >> "$2"; shift ;; --readall) ;; *) exit 1 ;; esac
    shift
done
CPU='CPU [1%@729,1%@729,4%@729,1%@729,0%@729,0%@729]'
ENGINES='EMC_FREQ 0%@204 GR3D_FREQ 0%@[305] NVDEC off NVJPG off NVJPG1 off VIC off OFA off APE 200'
ZONES='cpu@44.125C soc2@43.375C soc0@42.125C gpu@44.531C tj@44.531C soc1@43.156C'
RAILS='VDD_IN 2957mW/2957mW VDD_CPU_GPU_CV 486mW/486mW VDD_SOC 1012mW/1012mW'
while :; do
    echo "$(date '+%m-%d-%Y %H:%M:%S') RAM 3645/7620MB (lfb 63x4MB) SWAP 236/3810MB (cached 0MB)" \\
        "$CPU $ENGINES $ZONES $RAILS"
    sleep "$(awk "BEGIN { print $interval / 1000 }")"
done
"""


def nvpmodel_conf() -> str:
    """Synthetic: the grammar of NVIDIA's file, and clocks that devices were seen with."""
    text = "# Synthetic: of a virtual board, not NVIDIA's file.\n\n"
    for number, name, cores, mask, cpu_khz, gpu_hz, emc_hz in MODES:
        text += f"< POWER_MODEL ID={number} NAME={name} >\n"
        text += f"CPU_ONLINE CORES {cores}\n" + "".join(f"CPU_ONLINE CORE_{n} {int(n < cores)}\n" for n in range(6))
        text += f"TPC_POWER_GATING TPC_PG_MASK {mask}\nCPU_A78_0 MAX_FREQ {cpu_khz}\n"
        text += f"GPU MAX_FREQ {gpu_hz}\nEMC MAX_FREQ {emc_hz}\n\n"
    return text + f"< PM_CONFIG DEFAULT={DEFAULT_MODE} >\n"


def write_skin(folder: Path) -> tuple[Path, list[str]]:
    """Write a layer of files, and folders to be bound over what a layer cannot reach.

    Returns the layer, and systemd-nspawn's arguments for the rest: the device tree and the thermal zones of sysfs.
    """
    layer, tree, thermal = (folder / part for part in ("layer", "device-tree", "thermal"))
    plain = {
        "etc/nv_tegra_release": RELEASE,
        "etc/nvpmodel.conf": nvpmodel_conf(),
        "etc/nv_boot_control.conf": "TNSPEC 3767-302-0005-J.1-1-0-jetson-orin-nano-devkit-super-\n",
    }
    tools = {"usr/sbin/nvpmodel": NVPMODEL, "usr/bin/jetson_clocks": JETSON_CLOCKS, "usr/bin/tegrastats": TEGRASTATS}
    for mode, files in ((0o644, plain), (0o755, tools)):
        for name, text in files.items():
            _write(layer / name, text, mode)
    for name, text in DEVICE_TREE.items():
        _write(tree / name, text, 0o444)
    for n, (zone, milli_c) in enumerate(ZONES_MILLI_C.items()):
        _write(thermal / f"thermal_zone{n}" / "type", f"{zone}\n", 0o444)
        _write(thermal / f"thermal_zone{n}" / "temp", f"{milli_c}\n", 0o444)
    bound = [f"--bind-ro={tree}:/sys/firmware/devicetree/base", f"--bind-ro={thermal}:/sys/class/thermal"]
    return layer, ["--tmpfs=/sys/firmware", *bound]


def _write(path: Path, text: str, mode: int) -> None:
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir()
            parent.chmod(0o755)
    path.write_text(text)
    path.chmod(mode)
