@echo off
rem Installs Menma into a virtual environment of its own. Can be run again; fast when nothing changed.
rem DeepSpeed does not install on Windows: training uses Menma's own one-process engine there.
setlocal EnableExtensions
cd /d "%~dp0"

set "TORCH=torch==2.13.0"
set "VENV=.venv"
set "PY="
set "INDEX="
set "DEMO="
set "TEST="
set "EXTRAS=bnb,optimizers,logging"

:options
if "%~1"=="" goto find_python
if "%~1"=="--demo" (set "DEMO=1" & shift & goto options)
if "%~1"=="--test" (set "TEST=1" & set "EXTRAS=%EXTRAS%,test" & shift & goto options)
if "%~1"=="--dev" (set "EXTRAS=%EXTRAS%,dev" & shift & goto options)
if "%~1"=="--cpu" (set "TORCH=torch==2.13.0+cpu" & shift & goto options)
if "%~1"=="--venv" (set "VENV=%~2" & shift & shift & goto options)
if "%~1"=="--python" (set "PY=%~2" & shift & shift & goto options)
if "%~1"=="--torch-index" (set "INDEX=--extra-index-url %~2" & shift & shift & goto options)
if "%~1"=="-h" goto usage
if "%~1"=="--help" goto usage
echo menma: unknown option %~1 1>&2
echo        install.bat --help lists them 1>&2
exit /b 2

:usage
echo Usage: install.bat [options]
echo.
echo   --demo            install, then run the whole pipeline on the embedded model (menma demo)
echo   --test            install with the test extra, then run the tests
echo   --dev             install with the tools of a contributor
echo   --venv DIR        where the virtual environment goes (default: .venv)
echo   --python PY       the Python to build it from (default: py -3, then python)
echo   --cpu             the CPU build of torch
echo   --torch-index URL package index to take torch from; PyTorch's own ones have the CUDA builds
exit /b 0

:find_python
if exist "%VENV%\Scripts\python.exe" goto install
if defined PY goto check_python
py -3 -c "import sys" >nul 2>nul && set "PY=py -3"
if not defined PY set "PY=python"
:check_python
%PY% -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" >nul 2>nul
if errorlevel 1 (
  echo menma: no Python 3.11 or newer was found 1>&2
  echo        install one, or name it: install.bat --python C:\path\to\python.exe 1>&2
  exit /b 2
)
echo menma: making %VENV%
%PY% -m venv "%VENV%" || exit /b 2

:install
set "VPY=%VENV%\Scripts\python.exe"
rem pip itself is quick when everything is there already.
echo menma: installing %TORCH%
"%VPY%" -m pip install --disable-pip-version-check -c constraints.txt %INDEX% "%TORCH%" || exit /b 2
echo menma: installing Menma [%EXTRAS%]
"%VPY%" -m pip install --disable-pip-version-check -c constraints.txt -e ".[%EXTRAS%]" || exit /b 2

if defined DEMO "%VENV%\Scripts\menma.exe" demo || exit /b 1
if defined TEST goto tests
echo menma: done. Next:
echo   %VENV%\Scripts\activate
if defined DEMO (echo   menma new --help) else (echo   menma demo)
exit /b 0

:tests
"%VPY%" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
exit /b %errorlevel%
