# Read by the build of llama-cpp-python at its first project() (CMAKE_PROJECT_llama_cpp_INCLUDE).
# Of llama.cpp's tools, only those in QUANTKIT_TOOLS are built and installed; its converter is
# installed beside the Python package.

function(quantkit_choose_tools)
    set(tools_directory vendor/llama.cpp/tools)
    get_property(directories DIRECTORY ${tools_directory} PROPERTY SUBDIRECTORIES)
    foreach(directory ${directories})
        get_property(targets DIRECTORY ${directory} PROPERTY BUILDSYSTEM_TARGETS)
        list(REMOVE_ITEM targets mtmd)  # llama-server's library, which is installed in any case
        foreach(target ${targets})
            # What the chosen tools link is still built, for them.
            set_property(TARGET ${target} PROPERTY EXCLUDE_FROM_ALL TRUE)
        endforeach()
    endforeach()
    foreach(tool ${QUANTKIT_TOOLS})
        set_property(TARGET ${tool} PROPERTY EXCLUDE_FROM_ALL FALSE)
        foreach(target ${tool} ${tool}-impl)
            if(TARGET ${target})
                set_property(TARGET ${target} PROPERTY EXCLUDE_FROM_ALL FALSE)
                install(TARGETS ${target} RUNTIME LIBRARY)
            endif()
        endforeach()
    endforeach()
    # What is never called here (images and sound, downloads, tools), or once at the start,
    # is compiled without optimization, in about half the time.
    target_compile_options(mtmd PRIVATE -O0)
    quantkit_quickly(llama-common common arg.cpp preset.cpp download.cpp hf-cache.cpp)
    quantkit_quickly(llama-server-impl tools/server server-models.cpp)
    quantkit_quickly(server-context tools/server server-tools.cpp server-mcp.cpp)
endfunction()

function(quantkit_quickly target directory)
    list(TRANSFORM ARGN PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp/${directory}/)
    set_property(SOURCE ${ARGN} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS -O0)
endfunction()

function(quantkit_keep_converter)
    set(source ${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp)
    install(FILES ${source}/convert_hf_to_gguf.py ${source}/LICENSE DESTINATION llama_cpp/converter)
    foreach(package conversion gguf-py)
        install(DIRECTORY ${source}/${package} DESTINATION llama_cpp/converter)
    endforeach()
endfunction()

cmake_language(DEFER CALL quantkit_keep_converter)
cmake_language(DEFER CALL quantkit_choose_tools)
